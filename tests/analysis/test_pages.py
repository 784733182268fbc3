"""The pages fit a phone and a narrow window: a real browser finds nothing wider than the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.jsonl import write_examples
from sbs_edge.report.analysis import evaluation_page
from sbs_edge.report.compare import compare_page
from sbs_edge.report.data_check import check_page

LABELS = tuple(f"a_rather_long_label_about_the_matter_{letter}" for letter in "abcdefgh")
FRAMES = """<body>{frames}<output></output><script>onload = () => {{
  const wide = [...document.querySelectorAll("iframe")].flatMap(frame => {{
    const page = frame.contentDocument, found = [page.documentElement, ...page.querySelectorAll(".scroll, article, figure")];
    return found.filter(item => item.scrollWidth > item.clientWidth + 1)
      .map(item => [frame.src.split("/").pop(), frame.width, item.tagName, item.textContent.slice(0, 60)]);
  }});
  const frames = document.querySelectorAll("iframe").length;
  document.querySelector("output").textContent = JSON.stringify({{wide, frames}});
}}</script></body>"""


def _rows():
    text = "an input with averyveryverylongwordthatdoesnotbreakanywhere" * 3
    return [
        Example(
            str(i), f"{text} {i} " * (1 + i % 5), LABELS[i % 8], LABELS[(i // 2) % 8], f"because {i} " * 9
        )
        for i in range(160)
    ]


def _analysis(rows):
    given = [LABELS[(i * 3) % 8] for i in range(len(rows))]
    return analyse_answers(
        rows, given, [0.3 + i % 7 / 10 for i in range(len(rows))], [5 + i % 50 for i in range(len(rows))],
        TaskSpec("t", "closed", LABELS), str.__eq__, {"a column of a long name": ["a value " * 30] * len(rows)},
    )  # fmt: skip


def _comparison(rows):
    bundle = {
        "path": "runs/a/rather/long/path/to/the/bundle/of/the/service/desk/in/production/bundle", "version": "2026-11-25",
        "target": "cpu-int8", "accuracy": 0.7, "low": 0.6, "high": 0.8, "macro_f1": 0.7, "ece": 0.02,
        "label_ms": {"p50": 0.2, "p90": 0.3, "calls": 200}, "bytes": 123456,
    }  # fmt: skip
    return {
        "task": "desk", "reference": "gold", "rows": 160, "judged": 160, "bundles": [bundle, bundle], "agreement": 0.9,
        "gain": {"points": 1.0, "low": -1.0, "high": 3.0, "n": 160},
        "outcomes": {"both_right": 100, "only_first": 10, "only_second": 12, "none_right": 38},
        "labels": [{"label": name, "rows": 20, "recall": [0.5, 0.6], "precision": [0.5, None]} for name in LABELS],
        "differing": [
            {"row": row.id, "input": row.input, "wanted": row.label, "labels": [LABELS[0], LABELS[1]],
             "probabilities": [0.9, 0.8], "right": [True, False]}
            for row in rows[:3]
        ],
    }  # fmt: skip


def test_nothing_is_wider_than_the_page_at_400_and_at_1100_pixels(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine; apt-get install chromium to run this test")
    rows = _rows()
    write_examples(tmp_path / "rows.jsonl", rows)
    report = {
        "n": 160, "method": "first-token", "teacher_agreement": 0.5, "rationale_token_accuracy": 0.9,
        "analysis": _analysis(rows),
    }  # fmt: skip
    pages = {
        "evaluation.html": evaluation_page(report, "student", "test.jsonl"),
        "check.html": check_page(check_dataset(tmp_path / "rows.jsonl")),
        "compare.html": compare_page(_comparison(rows)),
    }
    for name, page in pages.items():
        (tmp_path / name).write_text(page)
    frames = "".join(
        f'<iframe width="{width}" height="900" src="{name}"></iframe>'
        for name in pages
        for width in (400, 1100)
    )
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames))
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--dump-dom", (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.S)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    assert json.loads(found[1]) == {"wide": [], "frames": 6}
