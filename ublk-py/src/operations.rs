// SPDX-License-Identifier: MIT OR Apache-2.0

//! Operations by their names in Python.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use ublk_core::{Op, Operations};

/// Returns the name of an operation in Python, which is the name of its method.
pub(crate) fn op_name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
        Op::Flush => "flush",
        Op::Discard => "discard",
        Op::WriteZeroes => "write_zeroes",
        Op::ZoneAppend => "zone_append",
        Op::ZoneOpen => "zone_open",
        Op::ZoneClose => "zone_close",
        Op::ZoneFinish => "zone_finish",
        Op::ZoneReset => "zone_reset",
        Op::ZoneResetAll => "zone_reset_all",
        Op::ReportZones => "report_zones",
    }
}

/// Operations that disks may support besides reads.
const OPERATIONS: [(Op, Operations); 4] = [
    (Op::Write, Operations::WRITE),
    (Op::Flush, Operations::FLUSH),
    (Op::Discard, Operations::DISCARD),
    (Op::WriteZeroes, Operations::WRITE_ZEROES),
];

/// Returns the operations with the given names of methods.
pub(crate) fn operations(names: &[String]) -> Operations {
    let named = |op: &Op| names.iter().any(|name| name == op_name(*op));
    OPERATIONS.iter().filter(|(op, _)| named(op)).map(|(_, operation)| *operation).collect()
}

/// Returns the names of operations.
pub(crate) fn operation_names(operations: Operations) -> Vec<&'static str> {
    OPERATIONS.iter().filter(|(_, one)| operations.contains(*one)).map(|(op, _)| op_name(*op)).collect()
}

/// Returns the member of `ublk.Op`.
pub(crate) fn op_object(py: Python<'_>, op: Op) -> PyResult<Py<PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static MEMBERS: [PyOnceLock<Py<PyAny>>; 5] = [const { PyOnceLock::new() }; 5];
    let index = match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        _ => 4,
    };
    let member = MEMBERS[index].get_or_try_init(py, || {
        let class = CLASS.get_or_try_init(py, || py.import("ublk._requests")?.getattr("Op").map(Bound::unbind))?;
        class.bind(py).call1((op_name(op),)).map(Bound::unbind)
    });
    member.map(|member| member.clone_ref(py))
}
