// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sizes on the command line, e.g. `512`, `64K`, `1G`, `1.5T`, `10GiB`.

/// Parses a size in bytes. Suffixes are powers of 1024.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size; examples: 4096, 64K, 512M, 1.5G, 2T");
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(split);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        "P" | "PB" | "PIB" => 50,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is more than 64 bits can hold"));
    }
    let value = number.parse::<f64>().map_err(|_| wrong())? * (1u64 << shift) as f64;
    if value.fract() != 0.0 || value >= u64::MAX as f64 {
        return Err(format!("{text:?} is not a whole number of bytes"));
    }
    Ok(value as u64)
}

/// Parses a size in bytes that fits in 32 bits.
pub(super) fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse(text)?).map_err(|_| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("64KiB", 65536), ("1.5G", 3 << 29), ("2T", 2 << 40), ("10 ", 10)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "G", "-1", "1X", "1.3", "1..5G", "99999999999999999999", "20000P", "0x10"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
