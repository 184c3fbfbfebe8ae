"""The waiting room against the plainest model of it: a list."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelswap.core.line import ADMIN, Ticket, TicketKey, WaitingRoom

GATEWAYS = ("g0", "g1", ADMIN)
MODELS = ("a", "b")
gateways = st.sampled_from(GATEWAYS)
models = st.sampled_from(MODELS)


class Room(RuleBasedStateMachine):
    """Adds and removes tickets in both, and compares all that can be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.room = WaitingRoom()
        self.plain: list[Ticket] = []
        self.numbers = 0

    @rule(gateway=gateways, model=models, rank=st.integers(0, 5), size=st.integers(0, 9))
    def add(self, gateway: str, model: str, rank: int, size: int) -> None:
        """Somebody comes."""
        self.numbers += 1
        ticket = Ticket(key=(gateway, self.numbers), model=model, arrived=float(rank), rank=float(rank), bytes=size)
        self.room.add(ticket)
        self.plain.append(ticket)

    @rule(index=st.integers(0, 1 << 16))
    def remove(self, index: int) -> None:
        """Anybody leaves."""
        if self.plain:
            ticket = self.plain.pop(index % len(self.plain))
            assert self.room.remove(ticket.key) is ticket

    @rule(model=models)
    def serve(self, model: str) -> None:
        """The first of a line leaves."""
        head = self.room.head(model)
        if head is not None:
            self.plain.remove(head)
            self.room.remove(head.key)

    @rule()
    def remove_a_stranger(self) -> None:
        """Who isn't there can't leave."""
        key: TicketKey = ("g0", -1)
        assert self.room.remove(key) is None

    @invariant()
    def same(self) -> None:
        """Both say the same."""
        room, plain = self.room, self.plain
        assert len(room) == len(plain)
        assert {t.key for t in room} == {t.key for t in plain}
        assert room.bytes == sum(t.bytes for t in plain)
        assert set(room.models()) == {t.model for t in plain}
        for model in MODELS:
            line = [t for t in plain if t.model == model]
            assert room.line(model).count == len(line)
            assert room.line(model).bytes == sum(t.bytes for t in line)
            assert set(room.line(model).gateways()) == {t.gateway for t in line}
            assert {t.key for t in room.of_model(model)} == {t.key for t in line}
            head = room.head(model)
            assert (head.rank if head else None) == min((t.rank for t in line), default=None)
            assert room.oldest(model) == (head.arrived if head else None)
            for gateway in GATEWAYS:
                here = [t for t in line if t.gateway == gateway]
                assert room.line(model).waiting_at(gateway) == len(here)
                # Among equal ranks, who came first is first.
                assert room.head(model, gateway) is min(here, key=lambda t: (t.rank, t.key[1]), default=None)
        for gateway in GATEWAYS:
            assert {t.key for t in room.of_gateway(gateway)} == {t.key for t in plain if t.gateway == gateway}
        for ticket in plain:
            assert ticket.key in room
            assert room.get(ticket.key) is ticket


TestRoom = Room.TestCase
TestRoom.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None)
