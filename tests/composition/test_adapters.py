"""PEFT's adapters, put on before `parallelize` or after it, switched, merged, trained and saved, do what they do on one device."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("peft", reason="adapters are tested with PEFT installed")

import autotp
from autotp.errors import AutoTPError
from autotp.numeric.exact import DOUBLE
from tests.composition.adapted import adapt, apart, base, ids, mesh_of, pair, plannings, train
from tests.support.ranks import Pool
from tests.support.slow import swept

WHEN = ["before", "after"]
KINDS = ["even", "fused", "concatenated", "padded", "shared", "tied", "experts", "joint"]
CASES = [(kind, when) for kind in KINDS for when in WHEN]
DORA = {"use_dora": True, "use_rslora": True, "bias": "lora_only"}


def trained(kind: str, tp: int, when: str, options: dict[str, Any]) -> list[float]:
    models = pair(kind, tp, when, **options)
    return [apart(models), train(models), apart(models)]


@pytest.mark.parametrize(("kind", "when"), swept(CASES, ("padded", "before")))
def test_trains(pool: Pool, kind: str, when: str) -> None:
    for found in pool.run(trained, kind, 2, when, {}):
        assert max(found) <= 1e-9, found


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "when"), CASES)
def test_trains_with_dora(pool: Pool, kind: str, when: str) -> None:
    for found in pool.run(trained, kind, 2, when, DORA):
        assert max(found) <= 1e-9, found


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "when"), [("padded", "before"), ("padded", "after"), ("fused", "after")])
def test_trains_where_no_dim_divides(pool: Pool, kind: str, when: str) -> None:
    for found in pool.run(trained, kind, 3, when, {}, world=3):
        assert max(found) <= 1e-9, found


@pytest.mark.sweep
@pytest.mark.parametrize("when", WHEN)
def test_embeddings_and_whole_modules(pool: Pool, when: str) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    for found in pool.run(trained, "padded", 2, when, options):
        assert max(found) <= 1e-9, found


def switched(kind: str, tp: int, when: str) -> tuple[dict[str, float], dict[str, int]]:
    found, plans = {}, {}
    models = pair(kind, tp, when)
    with plannings() as count:

        def look(name: str) -> None:
            found[name], plans[name] = apart(models), count[0]

        look("one")
        for m in models:
            adapt(m, "second", 5, r=2)
        look("added")
        for name in ("second", "default", "second"):
            for m in models:
                m.set_adapter(name)
            look(f"{name} is on")
        found["training the second"] = train(models, 2)
        with models[0].disable_adapter(), models[1].disable_adapter():
            look("all are off")
        for m in models:
            m.merge_adapter()
        look("merged")
        for m in models:
            m.unmerge_adapter()
        look("unmerged")
        for m in models:
            m.base_model.set_adapter(["default", "second"])
        look("both are on")
        for m in models:
            m.delete_adapter("second")
        look("one is gone")
    return found, plans


@pytest.mark.parametrize(("kind", "when"), swept(CASES, ("concatenated", "after")))
def test_switching_plans_once(pool: Pool, kind: str, when: str) -> None:
    for found, plans in pool.run(switched, kind, 2, when):
        assert max(found.values()) <= 1e-9, found
        first = 1 if when == "after" else 0
        assert plans["one"] == first
        assert plans["added"] == plans["unmerged"] == first + 1, plans  # the plan knows each adapter, none, and all merged
        assert plans["both are on"] == first + 2


def pinned(tp: int) -> tuple[float, int, int]:
    """Layouts that a recipe asked for stay, and their parameters are the same objects, when the model is planned again."""
    whole = {f"mlp.{n}_proj.weight": form for n, form in (("gate", "i e"), ("up", "i e"), ("down", "e i"))}
    one, shared = adapt(base("even")), autotp.parallelize(base("even"), mesh_of(tp), recipe={"whole": whole}, check="graph")
    before = {id(p): p._layout.dim for n, p in shared.named_parameters() if "mlp" in n}
    models = one, adapt(shared)
    far = apart(models)
    after = {id(p): p._layout.dim for n, p in shared.named_parameters() if "mlp" in n and "base_layer" in n}
    return far, len(before), sum(before.get(key, 0) is None and dim is None for key, dim in after.items())


def test_layouts_stay(pool: Pool) -> None:
    for far, some, kept in pool.run(pinned, 2):
        assert far <= 1e-9
        assert some == kept == 6


def two_entries(tp: int, when: str) -> int:
    """How often a model is planned whose inner model is called by itself between switches."""
    models = pair("even", tp, when)
    apart(models)
    with plannings() as count, torch.no_grad(), DOUBLE.mode():
        for _ in range(2):
            with models[1].disable_adapter():
                models[1](input_ids=ids())
            inner = models[1].base_model.model.model
            inner(input_ids=ids())
            with models[1].disable_adapter():
                inner(input_ids=ids())
            models[1](input_ids=ids())
    return count[0]


def test_switching_between_calls_of_the_model_and_of_its_inner_one(pool: Pool) -> None:
    assert pool.run(two_entries, 2, "before") == [0, 0]


def unloaded(kind: str, tp: int, when: str, merged: bool) -> list[float]:
    models = pair(kind, tp, when)
    for model in models:
        model.merge_adapter()  # before the first call with adapters
    found = [apart(models)]
    plain = [m.merge_and_unload(safe_merge=True) if merged else m.unload() for m in models]
    found.append(apart((plain[0], plain[1])))
    wanted, whole = plain[0].state_dict(), autotp.full_state_dict(plain[1])
    assert list(wanted) == list(whole)
    assert autotp.plan_of(plain[1]).settings == frozenset()
    return [*found, max(float((whole[n] - t).abs().max()) for n, t in wanted.items())]


@pytest.mark.parametrize(("kind", "when"), swept(CASES, ("tied", "after")))
def test_merge_and_unload(pool: Pool, kind: str, when: str) -> None:
    for merged in (True, False):
        for found in pool.run(unloaded, kind, 2, when, merged):
            assert max(found) <= 1e-9, found


def saved(kind: str, tp: int, when: str, at: str) -> list[Any]:
    from peft import PeftModel

    models, rank = pair(kind, tp, when), dist.get_rank()
    found: list[Any] = [apart(models)]
    models[1].save_pretrained(f"{at}/parallel", is_main_process=rank == 0)
    models[0].save_pretrained(f"{at}/one {rank}")
    dist.barrier()
    bits = [Path(at, name, "adapter_model.safetensors").read_bytes() for name in ("parallel", "one 0")]
    assert bits[0] == bits[1]
    assert {f.name for f in Path(at, "parallel").iterdir()} == {f.name for f in Path(at, "one 0").iterdir()}
    shared = autotp.parallelize(base(kind), mesh_of(tp), check="graph")
    again = PeftModel.from_pretrained(shared, f"{at}/parallel", autocast_adapter_dtype=False)
    return [*found, apart((models[0], again))]


@pytest.mark.parametrize(("kind", "when"), swept(CASES, ("padded", "after")))
def test_saves_the_bits_of_one_device(pool: Pool, tmp_path: Path, kind: str, when: str) -> None:
    for found in pool.run(saved, kind, 2, when, str(tmp_path)):
        assert max(found) <= 1e-9, found


def on_disk(tp: int, at: str) -> list[float]:
    """`add_adapter` of transformers, saved beside its base, and loaded by its directory alone."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    one, mesh = base("even"), mesh_of(tp)
    if dist.get_rank() == 0:
        one.save_pretrained(f"{at}/base")
    dist.barrier()
    shared = autotp.from_pretrained(f"{at}/base", mesh)
    for model in (one, shared):
        torch.manual_seed(1)
        model.add_adapter(config)
        model.double()
    found = [apart((one, shared)), train((one, shared), 1)]
    shared.save_pretrained(f"{at}/adapter")
    dist.barrier()
    assert json.loads(Path(at, "adapter", "adapter_config.json").read_text())["base_model_name_or_path"] == f"{at}/base"
    back = autotp.from_pretrained(f"{at}/adapter", mesh, dtype=torch.float64)
    return [*found, apart((one, back))]


def test_adapter_files(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(on_disk, 2, str(tmp_path)):
        assert max(found) <= 1e-9, found


def other_kinds(tp: int, when: str) -> dict[str, float]:
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    found: dict[str, float] = {}
    ia3 = IA3Config(
        task_type="CAUSAL_LM", init_ia3_weights=False, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    for name, config in {"ia3": ia3, "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}.items():

        def put(model: Any, config: Any = config) -> Any:
            torch.manual_seed(1)
            return get_peft_model(model, config, autocast_adapter_dtype=False).double()

        models = pair("even", tp, when, put)
        found[name] = max(apart(models), train(models))
    return found


@pytest.mark.sweep
@pytest.mark.parametrize("when", WHEN)
def test_other_adapters(pool: Pool, when: str) -> None:
    for found in pool.run(other_kinds, 2, when):
        assert max(found.values()) <= 1e-9, found


def told(tp: int) -> dict[str, str]:
    from peft import PrefixTuningConfig, get_peft_model
    from torch._dynamo.exc import InternalTorchDynamoError
    from torch.distributed.fsdp import fully_shard

    found: dict[str, str] = {}

    def attempt(name: str, work: Any) -> None:
        try:
            work()
            found[name] = "no error"
        except (AutoTPError, InternalTorchDynamoError) as error:
            found[name] = str(error)

    def prefix() -> None:
        models = pair("even", tp, "before", lambda m: get_peft_model(m, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
        models[1].double()(input_ids=ids())

    def whole_prefix() -> None:
        models = pair("shared", tp, "before", lambda m: get_peft_model(m, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
        models[1].double()(input_ids=ids())

    def some_ranks() -> None:
        shared = autotp.parallelize(base("even"), init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)), check="graph")
        (adapt(shared) if dist.get_rank() == 0 else shared)(input_ids=ids())

    def routed() -> None:
        pair("experts", tp, "before", target_modules="all-linear")

    def one_rank_alone() -> None:
        shared = pair("even", tp, "before")[1]
        with shared.disable_adapter() if dist.get_rank() == 0 else nullcontext():
            shared.generate(input_ids=ids(), max_new_tokens=2, do_sample=False, pad_token_id=0)

    def compiled() -> None:
        torch.compile(pair("even", tp, "after")[1], backend="eager")(input_ids=ids())

    def differing() -> None:
        shared = pair("even", tp, "after")[1]
        with torch.no_grad():
            next(p for n, p in shared.named_parameters() if "lora_A" in n).add_(dist.get_rank())
        shared(input_ids=ids())

    def sharded() -> None:
        mesh = init_device_mesh("cpu", (1, tp), mesh_dim_names=("dp", "tp"))
        shared = autotp.parallelize(adapt(base("even")), mesh, check="graph")
        fully_shard(shared, mesh=mesh["dp"])
        adapt(shared, "second")
        shared(input_ids=ids())

    def lost() -> None:
        shared = pair("even", tp, "before")[1]
        attempt("unplannable", lambda: _break(shared))
        shared(input_ids=ids())

    def _break(shared: Any) -> None:
        adapt(shared, "second")
        layer = next(m for n, m in shared.named_modules() if n.endswith("q_proj"))
        layer.lora_A["second"].forward = lambda x: torch.zeros(3)
        shared.set_adapter("second")
        shared(input_ids=ids())

    with DOUBLE.mode():
        for name, work in {
            "prefix": prefix,
            "whole prefix": whole_prefix,
            "some ranks": some_ranks,
            "routed": routed,
            "one rank alone": one_rank_alone,
            "compiled": compiled,
            "differing": differing,
            "sharded": sharded,
            "afterwards": lost,
        }.items():
            attempt(name, work)
    return found


def test_refusals_name_what_to_do(pool: Pool) -> None:
    for found in pool.run(told, 2):
        assert "past_key_values" in found["prefix"]
        assert "trained tensors that this model did not make" in found["whole prefix"]
        assert "Put adapters on, switch and merge them on every rank" in found["some ranks"]
        assert "puts other data into a tensor" in found["routed"]
        assert "the setting of the adapters" in found["one rank alone"]
        assert "before it is compiled" in found["compiled"]
        assert "lora_A" in found["differing"]
        assert "differ between ranks" in found["differing"]
        assert "before fully_shard" in found["sharded"]
        assert "cannot be planned again" in found["unplannable"]
        assert found["afterwards"] == found["unplannable"]


def sharded(when: str) -> list[float]:
    """FSDP2 over 2 × 2 ranks, whose batches are alike."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one = adapt(base("even"))
    if when == "before":
        shared = autotp.parallelize(adapt(base("even")), mesh, check="graph")
    else:
        shared = adapt(autotp.parallelize(base("even"), mesh, check="graph"))
    autotp.fully_shard(shared, mesh)
    models = one, shared
    return [apart(models), train(models), apart(models)]


@pytest.mark.sweep
@pytest.mark.parametrize("when", WHEN)
def test_under_fsdp(pool: Pool, when: str) -> None:
    for found in pool.run(sharded, when, world=4):
        assert max(found) <= 1e-9, found


def without(model: Any, tokens: Any) -> Any:
    """The logits with the adapters off."""
    with model.disable_adapter():
        return model(input_ids=tokens).logits


def served(tp: int) -> Any:
    """A server's answers; adapters that rank 0 alone switches are refused, after any number of calls."""
    models = pair("even", tp, "after")
    with DOUBLE.mode(), torch.no_grad(), autotp.serve(models[1], timeout=60) as server:
        if not server.leads:
            return None
        far = [float((server(input_ids=ids()).logits - models[0](input_ids=ids()).logits).abs().max()) for _ in range(6)]
        far.append(float((server.run(without, ids()) - without(models[0], ids())).abs().max()))
        with models[1].disable_adapter(), pytest.raises(AutoTPError, match="rank 0 has switched its adapters"):
            server(input_ids=ids())
        return max(*far, float((server(input_ids=ids()).logits - models[0](input_ids=ids()).logits).abs().max()))


def test_served(pool: Pool) -> None:
    far, _ = pool.run(served, 2)
    assert far <= 1e-9


def controlled(tp: int) -> float:
    """A factor of an adapter that is a tenth off on one rank's part."""
    models = pair("even", tp, "before")
    cut = next(p for n, p in models[1].named_parameters() if "lora_B" in n and p.to_local().shape != p.shape)
    with torch.no_grad():
        cut.to_local().mul_(1.1 if dist.get_rank() == 0 else 1.0)
    return apart(models)


def test_the_comparison_sees_one_wrong_part(pool: Pool) -> None:
    assert min(pool.run(controlled, 2)) > 1e-6
