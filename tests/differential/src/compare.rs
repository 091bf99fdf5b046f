// SPDX-License-Identifier: MIT OR Apache-2.0

//! Two traces of the same sequences, and what is different in them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::trace::Line;

/// Differences that are known, and why they are there.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Explained {
    #[serde(default)]
    difference: Vec<Explanation>,
}

/// One kind of difference. What is left out matches everything; what is given has to be found in the
/// field's text, the results have to be equal.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Explanation {
    /// Name of the command; how it begins, if this ends in `*`.
    command: String,
    /// Its case, or one of several that come together.
    case: Option<String>,
    context: Option<String>,
    #[serde(default)]
    arguments: Vec<String>,
    /// Result of the first trace.
    first: Option<String>,
    /// Result of the second trace.
    second: Option<String>,
    /// Text in the outputs of the first trace.
    first_outputs: Option<String>,
    /// Text in the outputs of the second trace.
    second_outputs: Option<String>,
    /// Flags that the device was made with, all of them.
    #[serde(default)]
    flags: u64,
    /// The second driver asks for what a short result (`result=` in the arguments) has left of the request
    /// (`req=` there), and the first one does not.
    #[serde(default)]
    rest: bool,
    /// What comes after it in the sequence cannot be compared.
    #[serde(default)]
    ends: bool,
    /// Why the drivers differ here.
    reason: String,
}

impl Explained {
    /// Reads the file of explained differences.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not as it should be", path.display()))
    }

    fn find(&self, difference: &Difference<'_>, flags: u64) -> Option<&Explanation> {
        let (Some(a), Some(b)) = (difference.first, difference.second) else { return None };
        self.difference.iter().find(|known| {
            let has = |text: &str, part: &Option<String>| part.as_ref().is_none_or(|part| text.contains(part.as_str()));
            let is = |text: &str, whole: &Option<String>| whole.as_ref().is_none_or(|whole| text == whole);
            names(&known.command, &a.command)
                && known.case.as_ref().is_none_or(|case| a.case == *case || a.case.split('+').any(|one| one == case))
                && has(&a.context, &known.context)
                && known.arguments.iter().all(|part| a.arguments.contains(part))
                && is(&a.result, &known.first)
                && is(&b.result, &known.second)
                && has(&a.outputs, &known.first_outputs)
                && has(&b.outputs, &known.second_outputs)
                && flags & known.flags == known.flags
                && (!known.rest || rest(a).is_some_and(|rest| b.outputs.contains(&rest) && !a.outputs.contains(&rest)))
        })
    }
}

/// Whether a pattern names a command.
fn names(pattern: &str, command: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == command, |beginning| command.starts_with(beginning))
}

/// A word of the arguments or outputs that begins like this.
fn word<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split(' ').find_map(|word| word.strip_prefix(name))
}

/// What is left of the request that this line ends, as an event names it.
fn rest(line: &Line) -> Option<String> {
    let request = word(&line.arguments, "req=").or_else(|| word(&line.arguments, ""))?;
    let (name, place) = request.split_once('@')?;
    let (sector, count) = place.split_once('+')?;
    let (sector, count): (u64, u64) = (sector.parse().ok()?, count.parse().ok()?);
    let done = word(&line.arguments, "result=")?.parse::<u64>().ok()? >> 9;
    let left = count.checked_sub(done).filter(|left| *left != 0 && done != 0)?;
    Some(format!("{name}@{}+{left} ", sector + done))
}

/// The flags that the device of these lines has, or that its ADD_DEV asks for.
fn flags(lines: &[&Line]) -> u64 {
    let made = lines.iter().rev().find(|line| line.command == "ADD_DEV" && line.result == "0");
    let said = match (made, lines.last()) {
        (_, Some(last)) if last.command == "ADD_DEV" => word(&last.arguments, "flags=0x"),
        (Some(made), _) => word(&made.outputs, "flags=0x"),
        _ => None,
    };
    said.and_then(|said| u64::from_str_radix(said, 16).ok()).unwrap_or(0)
}

/// The first place where two traces of a sequence part.
#[derive(Debug, Clone, Copy)]
struct Difference<'a> {
    first: Option<&'a Line>,
    second: Option<&'a Line>,
}

impl Difference<'_> {
    /// What makes two differences be of the same kind.
    fn kind(&self) -> String {
        match (self.first, self.second) {
            (Some(a), Some(b)) if (&a.command, &a.case, &a.arguments) != (&b.command, &b.case, &b.arguments) => {
                format!("{}: goes on otherwise ({})", a.command, b.command)
            }
            (Some(a), Some(b)) if a.result != b.result => {
                format!("{} ({}) in {}: {} / {}", a.command, a.case, a.context, a.result, b.result)
            }
            (Some(a), Some(b)) => {
                format!(
                    "{} ({}) in {}: {} and other outputs",
                    a.command,
                    a.case,
                    a.context,
                    differing(&a.outputs, &b.outputs)
                )
            }
            (Some(a), None) | (None, Some(a)) => format!("{}: only in one of them", a.command),
            (None, None) => "nothing".into(),
        }
    }
}

/// Names of the words that differ.
fn differing(a: &str, b: &str) -> String {
    let words = |text: &str| text.split([' ', ';']).map(str::to_owned).collect::<Vec<_>>();
    let (a, b) = (words(a), words(b));
    let names: Vec<String> = a
        .iter()
        .filter(|word| !b.contains(word))
        .chain(b.iter().filter(|word| !a.contains(word)))
        .map(|word| word.split('=').next().unwrap_or_default().to_owned())
        .collect();
    let mut names: Vec<String> = names.into_iter().take(4).collect();
    names.dedup();
    names.join(",")
}

/// What a comparison has found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Commands that both traces have.
    pub(crate) commands: usize,
    /// Sequences that both traces have.
    pub(crate) sequences: usize,
    /// Sequences with explained differences, by reason.
    pub(crate) explained: BTreeMap<String, usize>,
    /// Unexplained ones, by kind: how many, and the first sequence in both traces up to there.
    pub(crate) unexplained: BTreeMap<String, (usize, String)>,
}

impl Report {
    /// Whether all differences are explained, and there was something to compare.
    pub(crate) fn good(&self) -> bool {
        self.unexplained.is_empty() && self.commands > 0
    }
}

fn by_sequence(lines: &[Line]) -> BTreeMap<u64, Vec<&Line>> {
    let mut sequences: BTreeMap<u64, Vec<&Line>> = BTreeMap::new();
    for line in lines {
        sequences.entry(line.sequence).or_default().push(line);
    }
    sequences
}

/// Compares two traces. After an unexplained difference the rest of a sequence means nothing; after
/// an explained one the comparison goes on, unless the explanation says that it cannot.
pub(crate) fn compare(first: &[Line], second: &[Line], explained: &Explained) -> Report {
    let (a, b) = (by_sequence(first), by_sequence(second));
    let mut report = Report::default();
    let numbers: std::collections::BTreeSet<u64> = a.keys().chain(b.keys()).copied().collect();
    for number in numbers {
        let none = Vec::new();
        let (a, b) = (a.get(&number).unwrap_or(&none), b.get(&number).unwrap_or(&none));
        report.sequences += 1;
        for at in 0..a.len().max(b.len()) {
            let difference = Difference { first: a.get(at).copied(), second: b.get(at).copied() };
            if difference.first == difference.second {
                report.commands += 1;
                continue;
            }
            match explained.find(&difference, flags(&a[..(at + 1).min(a.len())])) {
                Some(known) => {
                    report.commands += 1;
                    *report.explained.entry(known.reason.clone()).or_default() += 1;
                    if known.ends {
                        break;
                    }
                }
                None => {
                    let entry = report.unexplained.entry(difference.kind()).or_insert_with(|| (0, story(a, b, at)));
                    entry.0 += 1;
                    break;
                }
            }
        }
    }
    report
}

/// A sequence up to where the traces part.
fn story(a: &[&Line], b: &[&Line], at: usize) -> String {
    let mut text = String::new();
    for line in a.iter().take(at) {
        text.push_str(&format!("    {line}\n"));
    }
    for (sign, line) in [('<', a.get(at)), ('>', b.get(at))] {
        match line {
            Some(line) => text.push_str(&format!("  {sign} {line}\n")),
            None => text.push_str(&format!("  {sign} (ends)\n")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::tests::line;

    fn explained(text: &str) -> Explained {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn equal_traces_agree() {
        let lines = [line(0, 0, "ADD_DEV", "0"), line(1, 0, "DEL_DEV", "-ENODEV")];
        let report = compare(&lines, &lines, &Explained::default());
        assert!(report.good());
        assert_eq!((report.commands, report.sequences), (2, 2));
    }

    #[test]
    fn nothing_is_no_agreement() {
        assert!(!compare(&[], &[], &Explained::default()).good());
    }

    #[test]
    fn a_difference_ends_its_sequence_only() {
        let a = [line(0, 0, "X", "0"), line(0, 1, "Y", "0"), line(1, 0, "X", "0")];
        let b = [line(0, 0, "X", "1"), line(0, 1, "Z", "0"), line(1, 0, "X", "0")];
        let report = compare(&a, &b, &Explained::default());
        assert!(!report.good());
        assert_eq!(report.unexplained.len(), 1);
        assert_eq!(report.commands, 1);
        let (kind, (count, story)) = report.unexplained.first_key_value().unwrap();
        assert!(kind.contains("X (ok) in DEAD: 0 / 1"), "{kind}");
        assert_eq!(*count, 1);
        assert!(story.contains("  < 0\t0\tX") && story.contains("  > 0\t0\tX"), "{story}");
    }

    #[test]
    fn a_trace_that_ends_early_differs() {
        let a = [line(0, 0, "X", "0"), line(0, 1, "Y", "0")];
        assert!(!compare(&a, &a[..1], &Explained::default()).good());
        assert!(!compare(&a[..1], &a, &Explained::default()).good());
        assert!(!compare(&a, &[], &Explained::default()).good());
    }

    #[test]
    fn explained_differences_are_counted_and_passed_over() {
        let known = explained("[[difference]]\ncommand = 'X'\nfirst = '0'\nsecond = '1'\nreason = 'because'\n");
        let a = [line(0, 0, "X", "0"), line(0, 1, "Y", "0")];
        let mut b = [line(0, 0, "X", "1"), line(0, 1, "Y", "0")];
        let report = compare(&a, &b, &known);
        assert!(report.good());
        assert_eq!(report.explained["because"], 1);
        b[1].result = "5".into();
        assert!(!compare(&a, &b, &known).good());
        b[0].result = "2".into();
        assert!(!compare(&a, &b, &known).good());
    }

    #[test]
    fn an_explanation_can_be_for_commands_that_begin_alike() {
        let known = explained("[[difference]]\ncommand = 'disk-*'\nreason = 'because'\n");
        for (command, good) in [("disk-read", true), ("disk", false), ("a-disk-read", false)] {
            let (a, b) = ([line(0, 0, command, "0")], [line(0, 0, command, "1")]);
            assert_eq!(compare(&a, &b, &known).good(), good, "{command}");
        }
    }

    #[test]
    fn an_explanation_of_a_case_holds_where_others_join_it() {
        let known = explained("[[difference]]\ncommand = 'X'\ncase = 'chunk'\nreason = 'because'\n");
        for (case, good) in [("chunk", true), ("chunk+len", true), ("a+chunk", true), ("chunks", false)] {
            let (mut a, mut b) = ([line(0, 0, "X", "0")], [line(0, 0, "X", "1")]);
            a[0].case = case.into();
            b[0].case = case.into();
            assert_eq!(compare(&a, &b, &known).good(), good, "{case}");
        }
    }

    #[test]
    fn an_explanation_can_end_its_sequence() {
        let a = [line(0, 0, "X", "0"), line(0, 1, "Y", "0"), line(1, 0, "Y", "0")];
        let mut b = [line(0, 0, "X", "1"), line(0, 1, "Z", "0"), line(1, 0, "Y", "0")];
        let known = explained("[[difference]]\ncommand = 'X'\nends = true\nreason = 'because'\n");
        assert!(compare(&a, &b, &known).good());
        b[2].result = "1".into();
        assert!(!compare(&a, &b, &known).good());
    }

    #[test]
    fn an_explanation_can_be_for_devices_with_certain_flags() {
        let known = explained("[[difference]]\ncommand = 'X'\nflags = 0x8\nreason = 'because'\n");
        let mut a = [line(0, 0, "ADD_DEV", "0"), line(0, 1, "X", "0")];
        let mut b = a.clone();
        b[1].result = "1".into();
        assert!(!compare(&a, &b, &known).good());
        for (flags, good) in [("0x8", true), ("0x4a", true), ("0x4", false)] {
            a[0].outputs = format!("state=0 flags={flags} id=0");
            b[0].outputs = a[0].outputs.clone();
            assert_eq!(compare(&a, &b, &known).good(), good, "{flags}");
        }
    }

    #[test]
    fn what_an_add_dev_asks_for_counts_for_itself() {
        let known = explained("[[difference]]\ncommand = 'ADD_DEV'\nflags = 0x8\nreason = 'because'\n");
        let mut a = [line(0, 0, "ADD_DEV", "-EINVAL")];
        let mut b = [line(0, 0, "ADD_DEV", "0")];
        for (flags, good) in [("0x8", true), ("0x4", false)] {
            a[0].arguments = format!("flags={flags} desc=0");
            b[0].arguments = a[0].arguments.clone();
            assert_eq!(compare(&a, &b, &known).good(), good, "{flags}");
        }
    }

    #[test]
    fn the_rest_of_a_request_has_to_be_right() {
        let known = explained("[[difference]]\ncommand = 'X'\nrest = true\nreason = 'because'\n");
        let mut a = [line(0, 0, "X", "0")];
        a[0].arguments = "op=1 req=WRITE@64+64 result=16384".into();
        a[0].outputs = "client0 write -> 32768".into();
        let mut b = a.clone();
        for (outputs, good) in [
            ("req q1 WRITE@96+32 f=0", true),
            ("req q1 WRITE@64+32 f=0", false),
            ("req q1 WRITE@96+64 f=0", false),
            ("req q1 READ@96+32 f=0", false),
            ("client0 write -> -EIO", false),
        ] {
            b[0].outputs = outputs.into();
            assert_eq!(compare(&a, &b, &known).good(), good, "{outputs}");
        }
    }

    #[test]
    fn an_explanation_needs_a_reason_and_known_fields() {
        for text in ["[[difference]]\ncommand = 'X'\n", "[[difference]]\ncommand = 'X'\nreason = 'r'\nresult = '0'\n"] {
            assert!(toml::from_str::<Explained>(text).is_err(), "{text}");
        }
    }
}
