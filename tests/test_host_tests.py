"""`tools/host_tests.py` on a library made for it, whose tests end in every way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import host_plugin
import host_tests
import update_readme

LIBRARY = """
import not_installed
from imagen_fast.models import UNet, UNetConfig

class Net(UNet):
    def __init__(self):
        super().__init__(UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=16, groups=4))
"""

TESTS = """
import unittest
import pytest
from invented import Net

@pytest.mark.parametrize("name", ["weight", "ResnetBlock"])
def test_holds(name):
    assert name in str(Net()) or any(name in key for key in Net().state_dict())

def test_breaks():
    assert type(Net().down[0].resnet).__name__ == "ResnetBlock"

def test_fails_anyway():
    raise OSError("no network: no file")

def test_left_out():
    pass

def test_is_skipped():
    pytest.skip("not today")

class TestOfAClass(unittest.TestCase):
    def test_breaks_in_a_subtest(self):
        for goes in (False, True):
            with self.subTest(goes=goes):
                self.assertTrue(goes or type(Net().down[0].resnet).__name__ == "ResnetBlock")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A library named invented, of version 1.2.3, and a folder `tests` beside it."""
    for file, text in {
        "invented/__init__.py": LIBRARY,
        "invented-1.2.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: invented\nVersion: 1.2.3\n",
        "tests/test_net.py": TESTS,
    }.items():
        (tmp_path / "invented==1.2.3" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "invented==1.2.3" / file).write_text(text, encoding="utf-8")
    return tmp_path / "invented==1.2.3"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(host_plugin, "make_hub", lambda folder: {})  # takes seconds, and these tests read no model
    monkeypatch.setattr(sys, "argv", ["host_tests.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the tool adds
    return host_tests.main()


def test_a_test_that_breaks_is_named_and_all_are_counted(checkout, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    given = (checkout, "tests", "--class", "Net", "--empty", "not_installed", "--json", out)
    assert run(monkeypatch, *given, "--", "-k", "not left_out") == 1
    named = "passes plain, failed accelerated: tests.test_net::test_breaks\n    AssertionError"
    assert named in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["host"], found["version"], found["tests_of"]) == ("invented", "1.2.3", "1.2.3")
    assert found["plain"] == {"failed": 1, "passed": 4, "skipped": 1}
    assert found["accelerated"] == {"failed": 3, "passed": 2, "skipped": 1}
    assert found["broken"] == ["tests.test_net.TestOfAClass::test_breaks_in_a_subtest", "tests.test_net::test_breaks"]
    assert found["failed_plain"] == {"tests.test_net::test_fails_anyway": "OSError"}
    assert found["objects"]["Net"]["accelerated"] == found["objects"]["Net"]["constructed"] > 3
    assert found["provenance"]["imagen_fast"]


def test_nothing_breaks(checkout, monkeypatch, capsys):
    ended = {"tests.test_net::test_holds": "passed", "tests.test_net::test_fails_anyway": "failed"}
    outcome = host_tests.Outcome(ended, {}, {"Net": {"constructed": 2, "accelerated": 2}})
    monkeypatch.setattr(host_tests, "run", lambda *_: outcome)
    assert run(monkeypatch, checkout, "tests", "--class", "Net") == 0
    assert capsys.readouterr().out.endswith("accelerated: {'failed': 1, 'passed': 1}\nNet: 2 of 2 accelerated\n")


def test_tests_of_which_nothing_was_accelerated_show_nothing(checkout, monkeypatch, capsys):
    outcome = host_tests.Outcome({"test": "passed"}, {}, {"Net": {"constructed": 2, "accelerated": 0}})
    monkeypatch.setattr(host_tests, "run", lambda *_: outcome)
    assert run(monkeypatch, checkout, "tests", "--class", "Net") == 1
    assert "nothing was accelerated" in capsys.readouterr().out


def test_tests_that_cannot_be_run_are_no_result(checkout, monkeypatch):
    with pytest.raises(SystemExit, match="did not run the tests"):  # without the module that is not installed
        run(monkeypatch, checkout, "tests", "--class", "Net")


def test_a_library_without_known_classes_is_refused(checkout, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, checkout, "tests")
    assert "of invented no class is known" in capsys.readouterr().err


def test_a_record_is_a_line_of_the_readme(tmp_path):
    found = {
        **{"host": "imagen_pytorch", "version": "2.1.0", "tests_of": "2.0.0", "tests": ["a/test_b.py", "c"]},
        **{"plain": {"failed": 1, "passed": 7}, "accelerated": {"failed": 3, "passed": 5}, "broken": ["x", "y"]},
        "objects": {"Unet": {"constructed": 4, "accelerated": 3}, "Imagen": {"constructed": 2, "accelerated": 2}},
        "provenance": {"commit": "0123456789abcdef"},
    }
    (tmp_path / "host_tests").mkdir()
    (tmp_path / "host_tests" / "it.json").write_text(json.dumps(found), encoding="utf-8")
    line = "| imagen-pytorch 2.1.0 | `test_b`, `c` of 2.0.0 | 5 | 2 | 0 | 1 | 5 | 0123456789 |"
    assert update_readme.host_tests(tmp_path).splitlines()[2:] == [line]
