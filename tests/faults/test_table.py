"""The table of cases lists exactly the tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_case_is_a_test_and_every_test_a_case():
    cases = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    tests = {name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert cases == tests - {"test_every_case_is_a_test_and_every_test_a_case"}
