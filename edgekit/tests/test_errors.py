import re

import pytest

from edgekit import errors
from edgekit.errors import EdgekitError, ToolchainError


def all_refusals():
    return [EdgekitError, *EdgekitError.__subclasses__()]


def test_every_refusal_has_an_exit_status_of_its_own_that_no_shell_uses():
    statuses = [refusal.exit_status for refusal in all_refusals()]
    assert len(set(statuses)) == len(statuses)
    assert all(0 < status < 64 for status in statuses)


def test_the_table_in_the_docstring_is_the_truth():
    written = re.findall(r"(\w+Error) +(\d+)", errors.__doc__)
    assert {name: int(status) for name, status in written} == {
        refusal.__name__: refusal.exit_status for refusal in all_refusals()
    }


@pytest.mark.parametrize("refusal", all_refusals())
def test_a_refusal_says_what_was_found_and_the_way_out(refusal):
    error = refusal("no target named 'pi'", hint="did you mean 'raspberry-pi-5-8gb'?")
    assert str(error) == "no target named 'pi'"
    assert error.hint.startswith("did you mean")
    assert refusal("nothing to add").hint == ""


def test_a_failed_tool_keeps_its_last_words():
    assert ToolchainError("llama_decode returned -1", log="invalid token").log == "invalid token"
