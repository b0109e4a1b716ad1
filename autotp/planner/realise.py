"""Turns placements and reductions into the changes at each module.

Every conversion is realised at the cheapest place that reaches it: a slot of a module boundary, the read of a parameter or buffer,
or a call site. Plans of blocks that were not traced are copies of their templates'.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from autotp.plan.conversions import Conversion, Op, in_order
from autotp.plan.expressions import Expr, freed, is_sharded
from autotp.plan.items import Path
from autotp.plan.layout import is_padded, shared
from autotp.plan.spec import DistributedForm, GradSum, ModulePlan, Slot, Use, Written
from autotp.planner.call_specs import CallSpec, sites_of
from autotp.planner.choice import Choice
from autotp.planner.counted import with_checks
from autotp.planner.demands import is_length
from autotp.planner.in_place import statistics, wrongly_changed
from autotp.planner.items import Boundaries, Signatures
from autotp.planner.joint_reductions import Joint, conversions_of, members
from autotp.planner.keys import AtPlace, AtSlot, Key, Keys, slot_key
from autotp.planner.local_ints import Localised
from autotp.planner.naming import Namer
from autotp.planner.partition import Atoms, local_size
from autotp.planner.placements import NONE, GraphIndex, SlotKey
from autotp.planner.reductions import Moves
from autotp.planner.refusals import Refusal
from autotp.planner.repeats import lift_modules
from autotp.trace.graph import Access, Node, Origin, Pseudo, Value

#: Calls that fail where the sizes that they are given do not hold the elements that they got.
_VIEWS = frozenset(("view", "reshape"))


class Builder:
    """Collects the changes of one plan. `linears`: paths of modules that run exactly one linear."""

    def __init__(
        self, space: GraphIndex, choice: Choice, moves: Moves, local: Localised, namer: Namer, linears: frozenset[str], tp: int,
        joints: tuple[Joint, ...], keys: Keys,
    ) -> None:  # fmt: skip
        self.space, self.choice, self.moves, self.local, self.namer, self.tp = space, choice, moves, local, namer, tp
        self.linears, self.joints, self.keys = linears, joints, keys
        self.graph, self.labels = space.graph, choice.labels
        self.slots: dict[tuple[Pseudo, str, tuple[str | int, ...]], list[Conversion]] = {}
        self.calls: dict[int, CallSpec] = {}  # node index → spec
        self.uses: dict[tuple[str, str, str], Use] = {}
        self.users: dict[int, list[Node]] = {}
        self.crossings: dict[Hashable, list[Node]] = {}  # slot → the nodes that cross it
        for node in self.graph.nodes:
            if (slot := slot_key(node)) is not None:
                self.crossings.setdefault(slot, []).append(node)
            for v in dict.fromkeys(node.inputs()):
                self.users.setdefault(v.id, []).append(node)
        self.made = space.made
        self.merged: dict[SlotKey, Path] = {}  # slot → the path that stands for it and its like

    def run(self) -> tuple[ModulePlan, ...]:
        """Returns the module plans of the traced modules, then of their repeats."""
        self._reduces()
        self._kernels()
        self._gathers()
        self._copies()
        self._slices()
        self._params()
        for index, ints in self.local.overrides.items():
            self._call(self.graph.nodes[index]).ints += list(ints)
        for index, multiples in self.local.multiples.items():
            self._call(self.graph.nodes[index]).multiples |= set(multiples)
        for index in self.local.literals:
            self._expect(self.graph.nodes[index])
        self._check_changes()
        return self._modules()

    def _converted(self, value: Value) -> tuple[Conversion, ...]:
        """Returns the conversions between a value and the one that it is made of."""
        node = self.made.get(value.id)
        if node is None:
            return ()
        slot = slot_key(node)
        if slot is not None:
            return tuple(self.slots.get(slot, ()))
        spec = self.calls.get(node.index, CallSpec())
        return tuple(c for table in (spec.inputs, spec.outputs) for conversions in table.values() for c in conversions)

    def _expect(self, node: Node) -> None:
        """Notes the local sizes of the tensors of a call in which a number of the code is changed: code that no traced call reached may
        bring a whole tensor there. A dim that is folded with a length (batch × heads) does not tell. A view of all sizes needs no telling:
        it holds as many elements as a rank has, and fails for others.
        """
        spec = self._call(node)
        call = self.graph.python.get(node.call)
        if call is not None and call.function in _VIEWS and all(e.value >= 0 for e in node.ints):
            return
        for at, key in enumerate(self.space.calls.nodes(node)[0].tensors):
            on = self.labels.shard.get(key, NONE)
            dims = self.space.axes.dims.get(key, ())
            for i, (dim, atoms) in enumerate(zip(dims, self.space.leaves.get(key, ()), strict=False)):
                if atoms & on and not any(is_length(self.space, self.labels, a) for a in atoms):
                    spec.sizes.add((at, i - len(dims), local_size(dim, on, self.labels.cuts)))
        if not spec.sizes:
            raise Refusal(node, "a number in the code would have to change, and no tensor of the call tells when")

    def _check_changes(self) -> None:
        """Checks that nothing is changed in place behind a conversion, and marks statistics that modules read in slices as written."""
        error = wrongly_changed(self.space, self.labels, self.moves.partial, self._converted)
        if error is not None:
            raise Refusal(*error)
        for node, buffer in statistics(self.space, self.labels):
            key = (node.module, *self._owner(buffer, node.module))
            use = self.uses.get(key)
            if use is None or not any(c.op is Op.SLICE for c in use.conversions):
                raise Refusal(node, "running statistics that are no buffers of the module would be updated in parts")
            path = next(result for result in self.graph.results if node.index < result.stop)
            always = node.args[5] and not path.training
            if use.written is not Written.ALWAYS:
                self.uses[key] = replace(use, written=Written.ALWAYS if always else Written.TRAINING)

    # where ------------------------------------------------------------------------------------------------------------------

    def _call(self, node: Node) -> CallSpec:
        if node.place is None or isinstance(node.op, Pseudo):
            raise Refusal(node, "no call site can be told")
        if reason := self.graph.sealed(node):
            raise Refusal(node, reason)
        return self.calls.setdefault(node.index, CallSpec())

    def _input(self, node: Node, value: Value, conversion: Conversion) -> None:
        spec = self._call(node)
        found = self.space.calls.arguments(node, value)
        if not found:
            raise Refusal(node, "the tensor to convert is no argument of the call in the code, or is changed in place by it")
        for i in found:
            spec.inputs.setdefault(i, []).append(conversion)

    def _output(self, node: Node, value: Value, conversion: Conversion) -> None:
        spec = self._call(node)
        found = self.space.calls.results(node, value)
        if not found:
            raise Refusal(node, "the tensor to convert is no result of the call in the code, or is changed in place by it")
        for i in found:
            spec.outputs.setdefault(i, []).append(conversion)

    def _at(self, key: Key, conversion: Conversion) -> None:
        if isinstance(key, AtSlot):
            self.slots.setdefault(key.slot, []).append(conversion)
            return
        if isinstance(key, AtPlace):
            for node, i in self.keys.at.get(key, ()):
                self._output(node, node.outputs[i], conversion)
            return
        maker = self.made.get(key.value)
        if maker is None:
            raise Refusal(self.users[key.value][0], "an argument of the model would need a conversion")
        value = next(o for o in maker.outputs if o.id == key.value)
        self._output(maker, value, conversion)

    # conversions --------------------------------------------------------------------------------------------------------------

    def _reduces(self) -> None:
        for key in sorted(self.moves.reduces, key=str):
            for op in conversions_of(self.joints, key):
                self._at(key, Conversion(op))

    def _kernels(self) -> None:
        for index, form in self.labels.distributed.items():
            spec = self._call(self.graph.nodes[index])
            spec.form = form
            if form is not DistributedForm.LOOKUP:
                spec.over, spec.over_dim = self._over(self.graph.nodes[index])

    def _over(self, node: Node) -> tuple[Expr | None, int]:
        """The expression of the dim that a statistic crosses, None where all ranks hold even parts of it."""
        found: list[tuple[Expr, int]] = []
        for contract, atoms in self.space.contracts[node.index]:
            on = self.labels.shard.get(contract.value, NONE) & atoms
            if not on:
                continue
            dims = self.space.axes.dims[contract.value]
            at = next(i for i, leaves in enumerate(self.space.leaves[contract.value]) if leaves & on)
            found.append((self.namer.expr(dims[at], on), at - len(dims)))
        if all(not is_padded(e, self.tp) and not shared(e, 0, self.tp).size for e, _ in found):
            return None, -1
        if len(found) > 1:
            raise Refusal(node, "a statistic would cross two sharded dims")
        return found[0]

    def _part(self, value: Value, atoms: frozenset[object], on: frozenset[object], op: Op) -> Conversion:
        if sum(bool(leaves & atoms) for leaves in self.space.leaves[value.id]) > 1:
            raise Refusal(self.users[value.id][0], "a tensor would be cut along two dims")
        for i, leaves in enumerate(self.space.leaves[value.id]):
            if leaves & atoms:
                expr: Expr = self.namer.expr(self.space.axes.dims[value.id][i], on)  # type: ignore[arg-type]
                return Conversion(op, i - len(value.shape), freed(expr))
        raise AssertionError("the value does not carry the axis")

    def gather(self, value: Value) -> Conversion | None:
        """Returns what makes a rank's part whole, None where it is cut along two dims."""
        on = self.labels.of(value)
        try:
            return self._part(value, on, on, Op.GATHER)
        except Refusal:
            return None

    def _gathers(self) -> None:
        for index, atoms in self.labels.gathered.items():
            node = self.graph.nodes[index]
            (value,) = node.args
            conversion = self._part(value, atoms, atoms, Op.GATHER)
            key = slot_key(node)
            assert key is not None
            if any(n.index not in self.labels.gathered for n in self.crossings[key]):
                raise Refusal(node, "only some calls of the module return a sharded value to gather")
            have = self.slots.setdefault(key, [])
            if conversion not in have:
                if any(c.op is Op.GATHER for c in have):
                    raise Refusal(node, "calls of one module would be gathered in different ways")
                have.append(conversion)

    def _copies(self) -> None:
        for key in sorted(self.moves.copies, key=str):
            if isinstance(key, AtSlot) and (inner := self._only_linears(key.slot)):
                for slot in inner:
                    self.slots.setdefault(slot, []).append(Conversion(Op.COPY))
            else:
                self._at(key, Conversion(Op.COPY))
        for index, number in self.moves.group_edges:
            node = self.graph.nodes[index]
            value = next(v for v in node.inputs() if v.id == number)
            self._input(node, value, Conversion(Op.COPY))

    def _only_linears(self, slot: Hashable) -> list[tuple[Pseudo, str, tuple[str | int, ...]]]:
        """The input slots of the linears that take over a COPY: all uses of the slot's tensor are arguments of linears."""
        found: dict[tuple[Pseudo, str, tuple[str | int, ...]], None] = {}
        for node in self.crossings.get(slot, ()):
            if node.slot is not None and node.slot[0] in self.linears:
                return []
            for user in self.users.get(node.outputs[0].id, ()):
                key = slot_key(user)
                if user.op is not Pseudo.ENTER or key is None or key[1] not in self.linears:
                    return []
                found[key] = None
        if any(any(c.op is Op.COPY for c in self.slots.get(k, ())) for k in found):
            return []
        values = {n.outputs[0].id for n in self.crossings.get(slot, ())}
        others = any(n.args[0].id not in values for key in found for n in self.crossings[key])
        return [] if others else list(found)

    def _slices(self) -> None:
        edges: dict[int, dict[int, Atoms]] = {}
        for (index, key), atoms in self.labels.slices.items():
            edges.setdefault(key, {})[index] = atoms
        slots: dict[Hashable, Conversion | None] = {}
        pending: list[tuple[Value, dict[int, Atoms], Conversion]] = []
        for key, nodes in edges.items():
            value = next(v for v in self.graph.nodes[next(iter(nodes))].inputs() if v.id == key)
            atoms = NONE.union(*nodes.values())
            pending.append((value, nodes, self._part(value, atoms, atoms, Op.SLICE)))
        for value, nodes, conversion in pending:
            slot = self._slot_of(value)
            if slot is not None:
                all_uses = set(nodes) == {n.index for n in self.users[value.id]}
                before = slots.get(slot, conversion)
                asked = value.id in self.graph.sized  # the code may compare its sizes with those of one device
                slots[slot] = conversion if all_uses and not asked and _same(before, conversion) else None
        for slot in slots:
            wanted = {v.id for v, _, _ in pending}
            if any(n.outputs[0].id not in wanted and self.users.get(n.outputs[0].id) for n in self.crossings.get(slot, ())):
                slots[slot] = None
        done: set[Hashable] = set()
        for value, nodes, conversion in pending:
            slot = self._slot_of(value)
            if slot is not None and slots[slot] is not None:
                if slot not in done:
                    self.slots.setdefault(slot, []).append(conversion)  # type: ignore[arg-type]
                    done.add(slot)
            elif value.origin is Origin.BUFFER and self._read_sliced(value, nodes, conversion):
                continue
            else:
                for index in nodes:
                    self._input(self.graph.nodes[index], value, conversion)

    def _slot_of(self, value: Value) -> Hashable | None:
        node = self.made.get(value.id)
        return slot_key(node) if node is not None else None

    def _read_sliced(self, value: Value, nodes: Mapping[int, object], conversion: Conversion) -> bool:
        by_module: dict[str, list[Node]] = {}
        for node in self.users[value.id]:
            by_module.setdefault(node.module, []).append(node)
        modules = {self.graph.nodes[i].module for i in nodes}
        if any(n.index not in nodes for m in modules for n in by_module[m]):
            return False
        for module in modules:
            owner, name = self._owner(value, module)
            self.uses[module, owner, name] = Use(owner, name, conversions=(conversion,))
        return True

    def _owner(self, value: Value, module: str) -> tuple[str, str]:
        table = self.graph.params if value.origin is Origin.PARAM else self.graph.buffers
        names = [n.rpartition(".") for n, v in table.items() if v is value]
        own = [n for n in names if n[0] == module]
        path, _, leaf = (own or names)[0]
        return path, leaf

    def _params(self) -> None:
        for value in dict.fromkeys(self.graph.params.values()):
            on = self.labels.of(value)
            repeated = bool(on) and any(_has_repeats(self.namer.expr(d, on), self.tp) for d in self.space.axes.dims[value.id])
            grad = GradSum.ALL if value.id in self.moves.grad_sums else GradSum.SHARED if repeated else GradSum.NONE
            conversions = (Conversion(Op.ONCE),) if value.id in self.labels.once else ()
            reading = [n.module for n in self.users.get(value.id, ())]
            for module in dict.fromkeys((*reading, *(m for m, key in self.graph.accesses if key == value.id))):
                accesses = self.graph.accesses.get((module, value.id), ())
                for full in dict.fromkeys(a.name for a in accesses):
                    owner, _, name = full.rpartition(".")
                    held = Access(full, True) in accesses
                    if grad is not GradSum.NONE or conversions or owner != module or held:
                        self.uses[module, owner, name] = Use(owner, name, grad, conversions, held=held)

    # assembly -----------------------------------------------------------------------------------------------------------------

    def _modules(self) -> tuple[ModulePlan, ...]:
        plans: dict[str, ModulePlan] = {}
        at_boundaries = Boundaries(self.space, Signatures(self.space, self.labels, self.moves, self.namer, self.slots).of)
        self.merged = at_boundaries.merged

        def at(path: str) -> ModulePlan:
            return plans.get(path) or ModulePlan(path)

        for (kind, path, where), conversions in self.slots.items():
            plan, ordered = at(path), in_order(conversions)
            if kind is Pseudo.ENTER and len(where) > 1 and path in self.graph.refilled:
                node = next(n for n in self.graph.nodes if n.slot == (path, where))
                raise Refusal(node, "the call changes the list or dict in which it is given a tensor to convert")
            # arguments that were one tensor in some call are converted alike, each by itself
            every = self.graph.members.get((path, where), (where,)) if kind is Pseudo.ENTER else (where,)
            have = plan.inputs if kind is Pseudo.ENTER else plan.outputs
            known = {s.path for s in have}
            paths = dict.fromkeys(self.merged.get((kind, path, p), p) for p in every)
            have += tuple(Slot(p, ordered) for p in paths if p not in known)
            plans[path] = replace(plan, inputs=have) if kind is Pseudo.ENTER else replace(plan, outputs=have)
        for (module, _, _), use in self.uses.items():
            plans[module] = replace(at(module), uses=(*at(module).uses, use))
        for module, attributes in self.local.attributes.items():
            plans[module] = replace(at(module), attributes=attributes)
        for module, sites in with_checks(self.space, self.labels, sites_of(self.space, self.calls)).items():
            plans[module] = replace(at(module), sites=tuple(sites))
        for module, groups in members(self.joints).items():
            plans[module] = replace(at(module), joint=groups)
        for module, items in at_boundaries.items.items():
            plans[module] = replace(at(module), items=tuple(items))
        for (module, name), values in self.graph.left.items():
            if any(self.labels.of(v) or v.id in self.moves.partial for v in values):
                plans[module] = replace(at(module), stashed=(*at(module).stashed, name))
        return lift_modules(plans, self.graph.repeats)


def _same(a: Conversion | None, b: Conversion) -> bool:
    return a is not None and a == b


def _has_repeats(expr: Expr, tp: int) -> bool:
    return is_sharded(expr) and shared(expr, 0, tp).size > 0
