# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tables and plots of the documents are made from the committed results."""

import json

import pages
import report


def test_the_documents_are_made_from_the_results():
    for path, text in pages.pages(json.loads(pages.RESULTS.read_text())).items():
        assert path.read_text() == text, path


def test_another_result_changes_the_documents():
    document = json.loads(pages.RESULTS.read_text())
    for row in document["results"]:
        if (row["peer"], row["job"]) == ("kublk-null", "randread-4k-qd32"):
            row["kernel"] *= 2
            row["iops"] /= 2
    changed = {path for path, text in pages.pages(document).items() if path.read_text() != text}
    assert changed == {pages.PAGE, pages.GOALS, pages.RESULTS.parent / "randread-4k-qd32.svg"}


def test_the_results_can_be_compared_with():
    document = json.loads(pages.RESULTS.read_text())
    slower = json.loads(pages.RESULTS.read_text())
    slower["results"][0]["kernel"] *= 2
    assert report.compare(document, document) == "no change of more than 5 %"
    assert slower["results"][0]["peer"] in report.compare(slower, document)


def test_a_compact_document_is_the_same():
    document = json.loads(pages.RESULTS.read_text())
    assert json.loads(report.compact(document)) == document
    assert json.loads(report.compact({"results": [{"iops": 12345.678}], "many": []})) == {
        "results": [{"iops": 12346.0}],
        "many": [],
    }


def test_the_page_is_short():
    assert len(pages.PAGE.read_text().splitlines()) <= 100
