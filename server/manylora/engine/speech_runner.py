"""The host part of a step of a model of speech. No torch."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from manylora.engine.model_runner import Ahead, ModelRunner, sampling_input, slots_of
from manylora.engine.sequence import Scheduled, Sequence
from manylora.engine.speech_rules import SpeechRules
from manylora.engine.step_input import Draw, SamplingInput, Scored, SoundInput, StepInput, Weighed

__all__ = ["SpeechRunner"]


class SpeechRunner(ModelRunner):
    """Runs plans of transcripts. Lives on the engine's thread. Implements `model_runner.Runner`."""

    def _build(self, planned: SequenceOf[Scheduled]) -> StepInput:
        slots, _ = slots_of(planned)
        sounds = tuple(
            SoundInput(item.seq.sound.spectrogram, int(slot) if item.seq.acts_from <= 0 else -1, item.seq.state_slot)
            for item, slot in zip(planned, slots, strict=True)
            if item.start == 0 and item.seq.sound is not None
        )
        return replace(super()._build(planned), sounds=sounds, heard=tuple(item.seq.state_slot for item in planned))

    def _sampling_input(
        self, seqs: SequenceOf[Sequence], ahead: SequenceOf[Ahead], rows: SequenceOf[int], scored: list[Scored]
    ) -> SamplingInput:
        found = sampling_input(seqs, ahead, rows, scored)
        rules = [(row, seq.rules, seq) for row, seq in enumerate(seqs) if isinstance(seq.rules, SpeechRules)]
        settled = [row for row, rule, seq in rules if rule.is_settled(seq.num_output_tokens)]
        weighed = [(row, seq) for row, rule, seq in rules if rule.weighs_times(seq.num_output_tokens)]
        if settled and found.draw is not None:
            found = replace(found, draw=_without(found.draw, settled))
        if weighed:
            speech = weighed[0][1].params.speech
            assert speech is not None
            numbers = np.array([row for row, _ in weighed], dtype=np.int64)
            found = replace(found, weighed=Weighed(numbers, speech.tokens.first_timestamp))
        return found


def _without(draw: Draw, rows: list[int]) -> Draw | None:
    """The draw of all rows but these, whose likeliest token is taken."""
    kept = ~np.isin(draw.rows, rows)
    if not kept.any():
        return None
    return Draw(
        rows=draw.rows[kept],
        temperature=draw.temperature[kept],
        top_k=draw.top_k[kept],
        top_p=draw.top_p[kept],
        min_p=draw.min_p[kept],
        typical_p=draw.typical_p[kept],
        uniform=draw.uniform[kept],
    )
