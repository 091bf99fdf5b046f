# SPDX-License-Identifier: MIT OR Apache-2.0
"""The table of features is what its generator makes of the committed results."""

import ast
import json

import matrix
import pytest

DOCUMENT = """<testsuites><testsuite name="pytest" timestamp="2026-01-02T03:04:05">
<properties>
<property name="driver" value="intree"/><property name="series" value="6.12"/>
<property name="kernel" value="6.12.1"/><property name="commit" value="abc"/>
<property name="offered" value="USER_COPY"/>
</properties>
<testcase classname="tests.e2e.test_zoned" name="test_zones"><skipped message="no zones"/></testcase>
<testcase classname="tests.e2e.test_stat" name="test_one"/>
<testcase classname="tests.e2e.test_stat" name="test_two"/>
<testcase classname="tests.e2e.test_stat" name="test_two"><error message="left behind"/></testcase>
<testcase classname="tests.e2e.test_data_movement" name="test_data[off-user-copy]"/>
<testcase classname="tests.e2e.test_data_movement" name="test_data[off-auto-zero-copy]"/>
<testcase classname="tests.e2e.test_data_movement" name="test_data[off-copy]"/>
<testcase classname="tests.e2e.test_resize" name="test_size"><skipped message="an image is missing"/></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def found(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/e2e.xml").write_text(DOCUMENT)
    return matrix.collect(tmp_path)


def test_the_page_has_the_table_of_the_results():
    page, results = matrix.PAGE.read_text(), json.loads(matrix.RESULTS.read_text())
    assert page == matrix.with_table(page, matrix.table(results))


def test_another_result_changes_the_page():
    page, results = matrix.PAGE.read_text(), json.loads(matrix.RESULTS.read_text())
    next(iter(results.values()))["features"]["statistics"] = "1 of 2 failed"
    assert page != matrix.with_table(page, matrix.table(results))


def test_a_feature_has_tests():
    # Parameters are not known here, so that only the parts of patterns before them are compared.
    known = set()
    for file in (matrix.ROOT / "tests/e2e").glob("test_*.py"):
        tree = ast.parse(file.read_text())
        known |= {f"{file.name}::{node.name}" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for feature in matrix.features():
        for pattern in feature["tests"]:
            without_parameters = pattern.partition("[")[0]
            assert any(matrix.matches(without_parameters + "*", name) for name in known), (feature["name"], pattern)


def test_outcomes_are_counted_per_feature(found):
    run = found["intree:6.12"]
    assert run["tests"] == {"failed": 1, "passed": 4, "skipped": 2}
    assert run["features"]["statistics"] == "1 of 2 failed"
    assert run["features"]["copy"] == run["features"]["user copy"] == "1 passed"


def test_documents_of_one_machine_are_merged(tmp_path):
    for name, child in (("one", "<skipped/>"), ("two", "")):
        (tmp_path / name).mkdir()
        case = f'<testcase classname="test_placement" name="test_nodes">{child}</testcase>'
        head, _, _ = DOCUMENT.partition("<testcase")
        (tmp_path / name / "e2e.xml").write_text(f"{head}{case}</testsuite></testsuites>")
    assert matrix.collect(tmp_path)["intree:6.12"]["tests"] == {"passed": 1}


def test_a_feature_that_the_driver_lacks_is_not_offered(found):
    features = found["intree:6.12"]["features"]
    assert features["zoned disks"] == "not offered"
    # Its test passed because the refusal was right.
    assert features["zero copy, registered by the driver"] == "not offered"


def test_skipped_tests_show_nothing():
    assert matrix.cell({"tests": ["test_resize.py"]}, {"test_resize.py::test_size": "skipped"}, set()) == "not run"


def test_a_test_of_a_refusal_is_not_one_of_the_feature():
    tests = {"test_zoned.py::test_an_older_driver_is_named_as_the_reason": "passed"}
    assert matrix.cell({"tests": ["test_zoned.py"]}, tests, set()) == "not run"


def test_failures_stand_out():
    assert "| **1&nbsp;of&nbsp;2&nbsp;failed** |" in matrix.table(
        {
            "intree:6.12": {
                "kernel": "6.12.1",
                "date": "2026-01-02",
                "commit": "abc",
                "tests": {},
                "features": {"statistics": "1 of 2 failed"},
            }
        }
    )
