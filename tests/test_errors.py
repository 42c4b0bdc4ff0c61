"""What an error says is bounded wherever it is made, but for what stops a start."""

import pytest

from manylora.errors import MAX_QUOTED, InvalidAdapter, InvalidRequest, InvalidSettings, Problem


@pytest.mark.parametrize("sent", ["x" * 100_000, "x " * 50_000, "x\n" * 50_000])
def test_a_message_that_quotes_too_much_is_cut(sent: str) -> None:
    error = InvalidRequest(f"The field '{sent}' is unknown.", param=sent)
    assert len(error.message) <= 1001
    assert len(str(error)) <= 1001
    assert len(error.param or "") == MAX_QUOTED + 1
    refused = InvalidAdapter([Problem("bad_config", sent, sent)]).body()
    assert max(len(refused["message"]), *(len(value) for value in refused["problems"][0].values())) <= 1001


def test_a_refused_adapters_message_names_the_place() -> None:
    refused = InvalidAdapter(
        [Problem("bad_config", "adapter_config.json: r", "It must be a whole number."), Problem("a", "b", "c")]
    )
    assert refused.message == (
        "The adapter was refused: adapter_config.json: r: It must be a whole number. (and 1 more)"
    )


def test_a_long_word_is_a_quote_and_the_rest_stays() -> None:
    assert InvalidRequest(f"No '{'x' * 5000} here.").message == f"No '{'x' * 199}… here."
    said = "Say " + "what is wrong. " * 20
    assert InvalidRequest(said).message == said


def test_what_stops_a_start_is_said_whole() -> None:
    said = "x" * 5000
    assert InvalidSettings(said).message == said
