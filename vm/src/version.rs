// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian's order of package versions: `[epoch:]upstream[-revision]`, where `~` sorts before
//! everything, even before the end.

use std::cmp::Ordering;

/// Compares two package versions as dpkg does.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (epoch_a, upstream_a, revision_a) = split(a);
    let (epoch_b, upstream_b, revision_b) = split(b);
    compare_numbers(epoch_a, epoch_b)
        .then_with(|| compare_part(upstream_a, upstream_b))
        .then_with(|| compare_part(revision_a, revision_b))
}

fn split(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch, upstream, revision)
}

/// Digit strings of any length, by value.
fn compare_numbers(a: &str, b: &str) -> Ordering {
    let a = a.trim_start_matches('0');
    let b = b.trim_start_matches('0');
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// Runs of non-digits and runs of digits in turn.
fn compare_part(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text_a, rest_a) = cut(a, |c| !c.is_ascii_digit());
        let (text_b, rest_b) = cut(b, |c| !c.is_ascii_digit());
        let (number_a, rest_a) = cut(rest_a, |c| c.is_ascii_digit());
        let (number_b, rest_b) = cut(rest_b, |c| c.is_ascii_digit());
        let order = compare_text(text_a, text_b).then_with(|| compare_numbers(number_a, number_b));
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    Ordering::Equal
}

fn cut(text: &str, keep: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !keep(c)).unwrap_or(text.len()))
}

fn compare_text(a: &str, b: &str) -> Ordering {
    let weight = |c: Option<char>| match c {
        Some('~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i64::from(u32::from(c)),
        Some(c) => i64::from(u32::from(c)) + 0x100,
    };
    let (mut a, mut b) = (a.chars(), b.chars());
    loop {
        let (next_a, next_b) = (a.next(), b.next());
        let order = weight(next_a).cmp(&weight(next_b));
        if order != Ordering::Equal || next_a.is_none() {
            return order;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_dpkgs() {
        // Ascending.
        let sorted = [
            "1.0~rc1-1",
            "1.0-1",
            "1.0-1+b1",
            "1.0a-1",
            "1.0+dfsg-1",
            "1.0.1-1",
            "1.9-1",
            "1.10-1",
            "6.12.115-1",
            "6.12.117-1~deb12u1",
            "6.12.117-1",
            "6.12.117-1.1",
            "7.2.13-1",
            "7.3.4-1~bpo13+1",
            "7.3.4-1",
            "1:0.1-1",
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} against {b}");
            }
        }
    }

    #[test]
    fn leading_zeroes_and_missing_revisions_do_not_matter() {
        assert_eq!(compare("1.01-1", "1.1-1"), Ordering::Equal);
        assert_eq!(compare("1.0", "1.0-0"), Ordering::Equal);
        assert_eq!(compare("0:1.0-1", "1.0-1"), Ordering::Equal);
    }
}
