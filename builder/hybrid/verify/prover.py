"""The proof: in a hybrid shard exactly the selected samples differ, and every other byte equals the source.

Reads both tars again, header by header, and relies neither on the table's offsets nor on the writer. Changes nothing on
disk: each problem is reported with its fix.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from builder import machine
from builder.errors import BuilderError, TransientError
from builder.hybrid.edit import Rules
from builder.hybrid.shard_plan import ShardPlan
from builder.hybrid.verify.pair import Pair
from builder.hybrid.verify.partition import check_partition, partition_of
from builder.hybrid.verify.problem import WRITE, Wrong, reason, removing
from builder.hybrid.verify.proof import Proof
from builder.machine import asked_again
from builder.store.layout import Layout
from builder.table import partitions


class Prover:
    """Proves the hybrid shards of a root one by one; after a problem in one it continues with the others.

    Args:
        shards: the shards to prove.
        rules: how samples are edited.
    """

    def __init__(self, layout: Layout, shards: Sequence[str], rules: Rules) -> None:
        self._layout, self._shards, self._rules = layout, shards, rules
        self._samples: dict[str, int] = {}
        self.proof = Proof(shards=len(shards))
        self.wrong: dict[str, str] = {}
        self._unread: dict[str, str] = {}

    @property
    def looked_at(self) -> int:
        """How many shards are done."""
        return self.proof.proven + len(self.wrong) + len(self._unread)

    def check_gone(self, shards: Sequence[str]) -> None:
        """Records hybrid shards whose sources are gone, so that nothing can be proven."""
        for shard in shards:
            state = partitions.partition_state(self._layout, shard)
            if state is not None and self._layout.hybrid(shard).exists() and not Path(state.source.path).exists():
                self.proof.shards += 1
                self.wrong[shard] = str(Wrong(f"its source '{state.source.path}' is gone", "put it back"))

    def readable(self) -> list[str]:
        """The shards whose partitions can be read. Any fault of a partition is recorded as a problem."""
        readable = []
        for shard in self._shards:
            with self._noting(shard):
                partition = asked_again(partial(partition_of, self._layout, shard))
                readable.append(shard)
                asked_again(partial(check_partition, self._layout, shard, partition))
        return readable

    def prove(self, plan: ShardPlan) -> None:
        """Proves one hybrid shard against its source and its plan."""
        if plan.shard in {**self.wrong, **self._unread}:
            return
        tries: list[Proof] = []

        def prove() -> int:
            tries.append(Proof())
            return Pair(self._layout, plan, self._rules, tries[-1]).prove()

        with self._noting(plan.shard):
            self._samples[plan.shard] = asked_again(prove)
            self.proof.proven += 1
        self.proof.add(tries[-1])

    @contextmanager
    def _noting(self, shard: str) -> Iterator[None]:
        """Records what is wrong with a shard; bytes that could not be read are recorded apart."""
        try:
            yield
        except Exception as error:
            if _may_pass(error):
                self._unread[shard] = str(machine.explained(error))
            elif isinstance(error, Wrong):
                self.wrong[shard] = str(error)
            elif isinstance(error, BuilderError | OSError):
                self.wrong[shard] = str(Wrong(reason(error), removing(self._layout.hybrid(shard), WRITE)))
            else:
                raise

    def refuse(self, shard: str, error: BuilderError) -> None:
        """Records a shard that has no plan."""
        if _may_pass(error):
            self._unread.setdefault(shard, str(error))
        else:
            self.wrong.setdefault(shard, str(Wrong(reason(error), error.fix)))

    def finish(self, table_shards: Iterable[str]) -> Proof:
        """Checks the files next to the hybrid shards, and returns the proof.

        Args:
            table_shards: every shard of the table.
        """
        loose = list(self._check_folder(set(table_shards)))
        self.proof.proven -= len(self.wrong.keys() & self._samples.keys())
        self._unread = {shard: why for shard, why in self._unread.items() if shard not in self.wrong}
        assert self.looked_at == self.proof.shards
        self.proof.problems = [f"shard '{shard}': {text}" for shard, text in sorted(self.wrong.items())] + loose
        self.proof.unread = [f"shard '{shard}': {text}" for shard, text in sorted(self._unread.items())]
        return self.proof

    def _check_folder(self, known: set[str]) -> Iterator[str]:
        """Problems of files that belong to no single shard. A wrong entry in `sizes.json` is a problem of its shard."""
        there = self._layout.hybrid_names()
        for shard in there:
            if shard not in known:
                path = self._layout.hybrid(shard)
                yield f"'{path}': it belongs to no shard of the table; fix: rm {shlex.quote(str(path))}"
        path = self._layout.sizes()
        try:
            sizes = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            if self._samples:
                yield f"'{path}': it is gone; fix: {WRITE}"
            return
        except ValueError:
            sizes = None
        if not isinstance(sizes, dict):
            yield f"'{path}': it is not a json object; fix: {WRITE}"
            return
        for name in sorted(sizes.keys() - {self._layout.hybrid(shard).name for shard in there}):
            if name not in {self._layout.hybrid(shard).name for shard in self.wrong}:
                yield f"'{path}': it names '{name}', which does not exist; fix: {WRITE}"
        for shard, count in self._samples.items():
            found = sizes.get(self._layout.hybrid(shard).name)
            if found != count:
                said = "does not name it" if found is None else f"says {found!r} samples, but it has {count}"
                self.wrong[shard] = str(Wrong(f"sizes.json {said}", WRITE))


def _may_pass(error: Exception) -> bool:
    """Whether an error says nothing about the shard: the same command may read it later."""
    return isinstance(error, TransientError) or machine.is_of_the_machine(error)
