"""What is kept of several texts between two steps: keys and values of each attention, in buffers with room to grow.

A step reads the buffers as they are, with the empty rows hidden by their positions, and its new rows are written in
place, by the engine or here: what a token costs does not hold a copy of the cache. Where the room ends a buffer grows
by an eighth, or by what is known to come. Attentions behind a place where tokens of the prompt were pruned hold fewer
rows than those before it: they are groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime.engines.base import Array
from optpass.runtime.manifest import TensorInfo

POSITION, PAST_POSITION, PICK, TREE, DEPTH, PARENT = "position", "past_position_", "pick", "tree", "depth", "parent"
"""Inputs of a step beside the ids and the kept rows.

``position [batch]``: of the first new token. ``past_position_G [batch, past_G]``: of each kept row of a group, or
negative where there is none.
``pick [batch, picked]``: the new tokens whose outputs are wanted, by their number. ``tree [batch, tokens, tokens]``:
which new tokens each of them continues, itself among them, ``depth [batch, tokens]`` how many those are beside itself
and ``parent [batch, tokens]`` the last of these; without a tree each continues all before it.
"""

LENGTH = "length_"
"""Input of a step that writes in place, ``length_G [batch]``: the filled rows of a group, behind which new ones go. Its
outputs ``present_key_N`` and ``present_value_N`` lie where ``past_key_N`` and ``past_value_N`` do."""

PAST = ("past_key_", "past_value_")
ROWS = ("key_", "value_")
"""The kept rows, ``past_key_N [batch, key heads, past_G, head_dim]``, and the new ones that a step returns."""

TOKEN, ORDER, ACCEPTED = "token", "order", "accepted"
CANDIDATES = ("candidates", "candidate_logits")
"""Outputs of a step that verifies: the likeliest token behind each node, node numbers with the accepted path in front,
how many nodes that has, and the likeliest tokens behind each node with their logits, best first."""

PLACE = "place_"
"""Outputs of a prefill, ``place_G [batch, rows]``: the tokens of the prompt whose rows a group keeps."""

PIECE = 256
"""The most tokens of a step: a longer prompt is taken in pieces, since the scores of attention are a square."""

LEAST_ROOM = 32
"""Rows; engines see few sizes, and few empty rows are scored."""


class Kept:
    """The state of some texts.

    Attributes:
        groups: their names, as in the names of inputs.
        position: int64 ``[batch]``, tokens that each text has so far, pruned ones among them.
        length: int64 ``[groups, batch]``, rows that are kept of each text.
        places: int64 ``[batch, room]`` for each group, the positions of its rows.
        context: the most tokens of a text.
        ahead: rows that a buffer has free at least when it has grown.
        in_place: whether steps write their rows here themselves.
    """

    def __init__(self, inputs: Sequence[TensorInfo], batch: int, context: int, ahead: int = 0) -> None:
        self.context, self.ahead = context, ahead
        names = [info.name for info in inputs]
        self.in_place = any(name.startswith(LENGTH) for name in names)
        mark = LENGTH if self.in_place else PAST_POSITION
        self.groups = [name.removeprefix(mark) for name in names if name.startswith(mark)]
        self.position = np.zeros(batch, np.int64)
        self.length = np.zeros((len(self.groups), batch), np.int64)
        room = min(LEAST_ROOM, context)
        self.places = [np.full((batch, room), -1, np.int64) for _ in self.groups]
        self.rows: dict[str, Array] = {}
        self._members: list[list[tuple[str, str]]] = [[] for _ in self.groups]
        for info in inputs:
            if info.name.startswith(PAST):
                _, heads, past, width = info.shape
                members = self._members[self.groups.index(str(past).removeprefix("past_"))]
                members.append((info.name, info.name.removeprefix("past_")))
                self.rows[info.name] = np.zeros((batch, int(heads), room, int(width)), info.dtype)

    def arrays(self) -> dict[str, Array]:
        """The inputs of a step that hold what is kept; its arrays are those of this object."""
        found = {f"{PAST_POSITION}{group}": places for group, places in zip(self.groups, self.places, strict=True)}
        if self.in_place:
            found |= {f"{LENGTH}{group}": length for group, length in zip(self.groups, self.length, strict=True)}
        return {**found, **self.rows}

    def reserve(self, tokens: int) -> None:
        """Have room for so many new rows of each text, where steps write them."""
        if self.in_place:
            for group, length in enumerate(self.length):
                self._grow(group, int(length.max()) + tokens)

    def check_room(self, tokens: int) -> None:
        """Refuse tokens that the context cannot hold.

        Raises:
            OptpassError: a text would be longer than the context.
        """
        longest = int(self.position.max(initial=0)) + tokens
        if longest > self.context:
            what = f"a text of {longest} tokens is longer than the context of {self.context}"
            raise OptpassError(
                "context", what, "shorten the prompt, ask for fewer tokens, or optimize for a longer one"
            )

    def append(self, new: Mapping[str, Array], counts: Array, nodes: Sequence[Sequence[int]] | None = None) -> None:
        """Keep new rows of a step.

        Args:
            new: ``key_N`` and ``value_N``, ``[batch, key heads, tokens, head_dim]``; none where steps write in place.
            counts: rows of each text, int64 ``[batch]``.
            nodes: for each text the numbers of its rows; the first ones by default.
        """
        for text, (first, count) in enumerate(zip(self.position.tolist(), counts.tolist(), strict=True)):
            places = np.arange(first, first + count)
            picked = list(nodes[text][:count]) if nodes is not None and count else []
            picked = [] if picked == list(range(count)) else picked
            for group in range(len(self.groups)):
                if self.in_place:
                    self._move(text, group, places, picked)
                else:
                    self._write(text, group, new, text, places, picked)
        self.position += counts

    def _move(self, text: int, group: int, places: Array, picked: list[int]) -> None:
        """Take rows as kept that lie behind those that are, ``picked`` of them or the first."""
        start = int(self.length[group, text])
        stop = start + len(places)
        self.places[group][text, start:stop] = places
        if picked:
            for name, _ in self._members[group]:
                rows = self.rows[name][text]
                rows[:, start:stop] = rows[:, [start + node for node in picked]]
        self.length[group, text] = stop

    def fill(self, text: int, new: Mapping[str, Array], row: int, places: Sequence[Array], tokens: int) -> None:
        """Begin a text with rows of a prompt of which some tokens were pruned.

        Args:
            text: which.
            new: as in ``append``.
            row: which text of ``new``.
            places: for each group, int64 ``[rows]``, the positions of its rows.
            tokens: of the prompt.
        """
        for group, found in enumerate(places):
            self._write(text, group, new, row, found)
        self.position[text] += tokens

    def rollback(self, position: Array) -> None:
        """Forget all rows of each text from ``position [batch]`` on."""
        for group, places in enumerate(self.places):
            places[places >= position[:, None]] = -1
            self.length[group] = (places >= 0).sum(1)
        self.position = np.minimum(self.position, position)

    def fork(self, texts: Sequence[int]) -> Kept:
        """A state of its own that holds copies of ``texts``, by their number, in that order."""
        made = object.__new__(Kept)
        made.context, made.ahead, made.in_place = self.context, self.ahead, self.in_place
        made.groups, made._members = self.groups, self._members
        index = np.asarray(texts, np.int64)
        made.position, made.length = self.position[index], self.length[:, index]
        made.places = [places[index] for places in self.places]
        made.rows = {name: rows[index] for name, rows in self.rows.items()}
        return made

    def _write(
        self, text: int, group: int, new: Mapping[str, Array], row: int, places: Array, picked: Sequence[int] = ()
    ) -> None:
        count = len(places)
        start = int(self.length[group, text])
        stop = start + count
        self._grow(group, stop)
        self.places[group][text, start:stop] = places
        for name, source in self._members[group]:
            rows = new[source][row]
            self.rows[name][text, :, start:stop] = rows[:, list(picked)] if picked else rows[:, :count]
        self.length[group, text] = stop

    def _grow(self, group: int, wanted: int) -> None:
        room = self.places[group].shape[1]
        if wanted <= room:
            return
        enough = max(wanted + wanted // 8, wanted + self.ahead)
        more = max(min(-(-enough // LEAST_ROOM) * LEAST_ROOM, self.context), wanted) - room
        self.places[group] = np.pad(self.places[group], ((0, 0), (0, more)), constant_values=-1)
        for name, _ in self._members[group]:
            self.rows[name] = np.pad(self.rows[name], ((0, 0), (0, 0), (0, more), (0, 0)))


def everyone(tokens: Array) -> Array:
    """Pick all tokens."""
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
