// SPDX-License-Identifier: MIT OR Apache-2.0

//! Traces: a line for each command, whose fields are separated by tabs.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// One command and what it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Number of the sequence.
    pub(crate) sequence: u64,
    /// Number of the command in it.
    pub(crate) step: u32,
    /// Name of the command.
    pub(crate) command: String,
    /// What is special about it: the generator's reason for it.
    pub(crate) case: String,
    /// State of the device and of its server before.
    pub(crate) context: String,
    /// Its arguments.
    pub(crate) arguments: String,
    /// What it returned.
    pub(crate) result: String,
    /// What it brought, and what happened until everything was quiet again.
    pub(crate) outputs: String,
}

impl Line {
    /// Reads a line of a trace.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let fields: Vec<&str> = text.split('\t').collect();
        let [sequence, step, command, case, context, arguments, result, outputs] = fields[..] else {
            bail!("{} fields instead of 8", fields.len());
        };
        Ok(Line {
            sequence: sequence.parse().context("the sequence is no number")?,
            step: step.parse().context("the step is no number")?,
            command: command.to_owned(),
            case: case.to_owned(),
            context: context.to_owned(),
            arguments: arguments.to_owned(),
            result: result.to_owned(),
            outputs: outputs.to_owned(),
        })
    }
}

impl Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            self.sequence, self.step, self.command, self.case, self.context, self.arguments, self.result, self.outputs
        )
    }
}

/// A trace that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    file: BufWriter<File>,
    /// Lines so far.
    pub(crate) lines: u64,
    last: Instant,
    times: BTreeMap<String, (u32, Duration)>,
}

impl Writer {
    /// A new file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Writer { file: BufWriter::new(file), lines: 0, last: Instant::now(), times: BTreeMap::new() })
    }

    /// Appends a line.
    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        writeln!(self.file, "{line}").context("cannot write the trace")?;
        self.lines += 1;
        let now = Instant::now();
        let time = self.times.entry(line.command.clone()).or_default();
        time.0 += 1;
        time.1 += now - self.last;
        self.last = now;
        Ok(())
    }

    /// Where the time went: commands, how many of each, how long all of them took.
    pub(crate) fn times(&self) -> Vec<(&str, u32, Duration)> {
        let mut times: Vec<_> = self.times.iter().map(|(name, (count, time))| (name.as_str(), *count, *time)).collect();
        times.sort_by_key(|(_, _, time)| std::cmp::Reverse(*time));
        times
    }

    /// Brings everything to the file.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.file.flush().context("cannot write the trace")
    }
}

/// All lines of a trace.
pub(crate) fn read(path: &Path) -> Result<Vec<Line>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut lines = Vec::new();
    for (number, text) in BufReader::new(file).lines().enumerate() {
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        lines.push(Line::parse(&text).with_context(|| format!("{}:{}", path.display(), number + 1))?);
    }
    Ok(lines)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A line of a made-up trace.
    pub(crate) fn line(sequence: u64, step: u32, command: &str, result: &str) -> Line {
        Line {
            sequence,
            step,
            command: command.into(),
            case: "ok".into(),
            context: "DEAD".into(),
            arguments: "a=1 b=2".into(),
            result: result.into(),
            outputs: String::new(),
        }
    }

    #[test]
    fn lines_are_read_as_they_were_written() {
        let line = line(3, 4, "ADD_DEV", "-22");
        assert_eq!(Line::parse(&line.to_string()).unwrap(), line);
    }

    #[test]
    fn other_lines_are_refused() {
        for text in ["", "1\t2\tx", "x\t2\tc\tc\tc\ta\tr\to", "1\t2\tc\tc\tc\ta\tr\to\tmore"] {
            assert!(Line::parse(text).is_err(), "{text}");
        }
    }
}
