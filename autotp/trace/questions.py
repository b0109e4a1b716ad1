"""Records the questions of model code in a call, and answers them: whether gradients are recorded, and conditions on unknown data.

Code may take another path for another answer. So the questions tell which further paths to trace.
"""

from __future__ import annotations

from typing import Any

from autotp.trace.graph import Node, Place
from autotp.trace.tape import Tape
from autotp.trace.watch import Question, is_model

Where = tuple[str, Place | None]


class Questions:
    """Keeps the questions of one recorder. `data_vary`: facts about the known inputs may not hold for others."""

    def __init__(self, tape: Tape) -> None:
        self.asked: set[Question] = set()
        self.inference = self.contrary = False
        self.swapped = False  # a number was the other one of 0 and 1 in this call
        self.data_vary = False
        self.turned: list[Where] = []  # where a condition got the contrary of the usual answer
        self.settled: set[Place | Where] = set()  # where it always gets the usual one
        self.conditions: list[Where] = []  # where a condition was asked in this call
        self.reversed: set[Place | Where] = set()  # places where the usual answer makes the code raise: the other one is usual there
        self._tape = tape

    def begin(self, inference: bool, contrary: bool) -> None:
        """Begins a call. `inference`: as if in inference mode. `contrary`: see `condition`."""
        self.inference, self.contrary = inference, contrary
        self.turned, self.conditions, self.swapped = [], [], False

    def ask(self, question: Question, file: str) -> None:
        """Notes that code in `file` asks about gradients: the path that it takes then may be another."""
        if not self._tape.quiet and is_model(file) and not self._tape.hidden(file):
            self.asked.add(question)

    def condition(self, usual: bool, node: Node | None) -> bool:
        """Answers a condition on unknown data: the `usual` answer, or the contrary the first time that a module asks at some place."""
        return self.asked_at(usual, None if node is None else node.place)

    def asked_at(self, usual: bool, place: Place | None) -> bool:
        """As `condition`, of a place in the code."""
        self.asked.add(Question.CONDITION)
        where = self._tape.module, place
        self.conditions.append(where)
        usual = usual is not (self.check(where) in self.reversed)
        if not self.contrary or where in self.turned or not self.settled.isdisjoint((where, self.check(where))):
            return usual
        self.turned.append(where)
        return not usual

    def check(self, where: Where) -> Place | Where:
        """Returns the place in the code: one check is made by all modules of a class."""
        return where[1] or where

    def settle(self, file: str, function: str) -> None:
        """Always answers the last condition that was turned as usual: the code then raised in `function` of `file`.

        Where that is what asked, all modules whose code it is make the check.
        """
        where = self.turned[-1]
        place = where[1]
        own = place is not None and (place.file, place.function.rpartition(".")[2]) == (file, function)
        self.settled.add(self.check(where) if own else where)

    def number_at(self, usual: Any, place: Place | None) -> Any:
        """The usual number, or in the contrary case the other one of 0 and 1, where code makes a plain number of unknown data: what it
        compares then is not seen, and is mostly a flag.
        """
        before = len(self.turned)
        self.asked_at(True, place)
        self.swapped = self.swapped or len(self.turned) > before
        return usual if len(self.turned) == before else type(usual)(1 - usual)
