"""From ModelInputs to the one vector per candidate that most ranking models start with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchrank.features.schema import FeatureSchema, SequenceSlot
from torchrank.nn.attention import TargetAttention
from torchrank.nn.inputs import ModelInputs


class FeatureInput(nn.Module):
    """x = [user pooled, user dense, item pooled, item dense, one vector per sequence], float [N, out_dim].

    A sequence named in `attention` is summed by target attention, its query being the pooled embedding of the
    feature that `attention` names (of the same group and dim, on the item side); any other is averaged.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        group: str = "deep",
        attention: Mapping[str, str] | None = None,
        attention_hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        self.user_slots = [(slot.start, slot.start + slot.dim) for slot in schema.user_pooled if slot.group == group]
        self.item_slots = [(slot.start, slot.start + slot.dim) for slot in schema.item_pooled if slot.group == group]
        self.sequences = [slot for slot in schema.sequences if slot.group == group]
        self.attended: dict[str, tuple[int, int, int]] = {}  # sequence -> its attention layer, its query's columns
        self.attention = nn.ModuleList()
        for name, feature in (attention or {}).items():
            sequence = _sequence(self.sequences, name)
            self.attended[sequence.name] = (len(self.attention), *_query_columns(schema, group, sequence, feature))
            self.attention.append(TargetAttention(sequence.dim, attention_hidden))
        self.out_dim = (
            sum(stop - start for start, stop in self.user_slots + self.item_slots)
            + len(schema.user_dense)
            + len(schema.item_dense)
            + sum(slot.dim for slot in self.sequences)
        )

    def forward(self, inputs: ModelInputs) -> Tensor:
        user = torch.cat([*_columns(inputs.user_pooled, self.user_slots), inputs.user_dense], dim=1)
        parts = [user.index_select(0, inputs.user_index), *_columns(inputs.item_pooled, self.item_slots)]
        parts.append(inputs.item_dense)
        parts += [self._sequence_vector(slot, inputs) for slot in self.sequences]
        return torch.cat(parts, dim=1)

    def _sequence_vector(self, slot: SequenceSlot, inputs: ModelInputs) -> Tensor:
        keys, length = inputs.sequences[slot.name], inputs.lengths[slot.name]
        if slot.name not in self.attended:
            # Padding is zeros, so the plain sum is the sum over the real positions.
            mean = keys.sum(dim=1) / length.clamp(min=1).unsqueeze(1).to(keys.dtype)
            return mean.index_select(0, inputs.user_index) if slot.rows == "user" else mean
        if slot.rows == "user":
            keys, length = keys.index_select(0, inputs.user_index), length.index_select(0, inputs.user_index)
        layer, start, stop = self.attended[slot.name]
        return self.attention[layer](inputs.item_pooled[:, start:stop], keys, length)


def _columns(pooled: Tensor, slots: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The slots' columns, neighbouring slots as one slice (usually the whole tensor)."""
    merged: list[list[int]] = []
    for start, stop in slots:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return [pooled[:, start:stop] for start, stop in merged]


def _sequence(sequences: Sequence[SequenceSlot], name: str) -> SequenceSlot:
    for slot in sequences:
        if slot.feature == name:
            return slot
    raise ValueError(
        f"attention over {name!r}: no such sequence; there are: {', '.join(s.feature for s in sequences) or 'none'}"
    )


def _query_columns(schema: FeatureSchema, group: str, sequence: SequenceSlot, feature: str) -> tuple[int, int]:
    slots = [slot for slot in schema.item_pooled if slot.group == group]
    for slot in slots:
        if slot.feature == feature:
            if slot.dim != sequence.dim:
                raise ValueError(
                    f"attention over {sequence.feature!r} (dim {sequence.dim}) with query {feature!r} "
                    f"(dim {slot.dim}): the dims must be equal"
                )
            return slot.start, slot.start + slot.dim
    raise ValueError(
        f"attention query {feature!r}: no such item feature; there are: {', '.join(s.feature for s in slots) or 'none'}"
    )
