"""Makes small example inputs for every path that a user of a model runs.

    example_inputs(model)         -> the paths of a Hugging Face model, from its config and its forward signature
    user_examples(model, given)   -> the paths that the caller gave, checked against the forward signature, and their flags turned

An `Example` builds its tensors when asked (`make()`), on the CPU, so a list of examples costs nothing. The first one is the plain
forward. The others are *optional*: a path that the model may have (a mask, a cache, a loss, an image). A failure there says that
the model does not take it in this form.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autotp.adapters import settings
from autotp.errors import InputError
from autotp.hugging_face import is_hugging_face
from autotp.inputs.by_name import value_of, why_not
from autotp.inputs.facts import Facts, Guess, forward_keywords, takes_any_keyword
from autotp.inputs.labels import labels
from autotp.inputs.media import AUDIO, IMAGES, with_medium
from autotp.inputs.values import BATCH, VALUES, token_ids
from autotp.trace.example import Example, Given, Inputs

_MOST_TURNED = 6
_FEATURES = re.compile("get_[a-z0-9_]+_features")


def example_inputs(model: nn.Module, guess: Guess | None = None) -> tuple[Example, ...]:
    """The calls to trace for a Hugging Face `model`, the plain forward first. `guess`: what they are made with beside the first guess.

    Raises:
        InputError: `model` is no `PreTrainedModel`, or its forward requires a keyword that the config says nothing of.
    """
    if not is_hugging_face(model):
        needed = [k.name for k in forward_keywords(model).values() if k.required]
        raise InputError(
            f"{type(model).__name__} is not a transformers model, so its inputs cannot be derived from a config: pass "
            f"example_inputs={{name: value}} with {_listed(needed) if needed else 'the keywords of its forward'}"
        )
    if type(model).forward is nn.Module.forward:
        raise InputError(f"{type(model).__name__} has no forward of its own: make the models inside of it parallel, each for itself")
    facts = Facts(model, guess=guess)
    base = _base(facts)
    unknown = {name: reason for name in base if (reason := why_not(facts, name)) is not None}
    if unknown:
        told = "; ".join(f"{name!r} ({reason})" for name, reason in unknown.items())
        raise InputError(
            f"{type(model).__name__}.forward requires what autotp cannot make up from the config: {told}: "
            f"pass example_inputs={{name: value}} with {_listed(base)}"
        )
    return (*_examples(facts, base), *_features(model, facts.guess), *_generators(model), *_encoder(model))


def user_examples(model: nn.Module, given: Given) -> tuple[Example, ...]:
    """The caller's `example_inputs=`, after checking each call against the signature of `model.forward`.

    Where its config says nothing of other calls, some follow that the model may take as well: a flag turned, an argument left out.

    Raises:
        InputError: no mapping with string keys and no list of them, a key that forward does not take, a required one that is missing;
            all of these problems are named at once.
    """
    calls: list[Any] = list(given) if isinstance(given, (list, tuple)) and given else [given]
    names = ["user", *(f"user {i}" for i in range(2, len(calls) + 1))]
    for mapping in calls:
        _check_call(model, mapping)
    users = [Example(name, partial(dict, mapping)) for name, mapping in zip(names, calls, strict=True)]
    return tuple(users) if is_hugging_face(model) else (*users, *islice(_turned(model, calls), _MOST_TURNED))


def user_internals(model: nn.Module, given: Given) -> tuple[Example, ...]:
    """The caller's first call of a transformers `model`, asked for hidden states and attention weights."""
    call: Any = given if isinstance(given, Mapping) else given[0]
    more = internals(Facts(model), lambda **options: lambda: {**call, **options})
    return tuple(replace(e, name=f"user with {e.name}", quiet=True) for e in more)


def _turned(model: nn.Module, calls: Sequence[Mapping[str, object]]) -> Iterator[Example]:
    """The first call with a flag turned that no call turns, without an argument that may be absent and never is, and with all of that."""
    turned: dict[str, object] = {}
    for p in inspect.signature(model.forward).parameters.values():
        values = [call.get(p.name, p.default) for call in calls]
        if isinstance(p.default, bool) and all(v is values[0] for v in values) and isinstance(values[0], bool):
            other: object = not values[0]
        elif p.default is None and all(v is not None for v in values):
            other = None
        else:
            continue
        turned[p.name] = other
    changes = [{name: other} for name, other in turned.items()] + ([turned] if len(turned) > 1 else [])
    for change in changes:
        told = ", ".join(f"{name}={other}" for name, other in change.items())
        yield Example(f"user with {told}", partial(dict, calls[0], **change), optional=True, quiet=True)


def _check_call(model: nn.Module, mapping: Any) -> None:
    where = f"example_inputs of {type(model).__name__}"
    if not isinstance(mapping, Mapping):
        raise InputError(
            f"{where}: got a {type(mapping).__name__}, wanted a mapping (or a list of several) from the keywords of forward to their "
            "values, such as {'input_ids': torch.zeros(2, 8, dtype=torch.long)}"
        )
    keywords = forward_keywords(model)
    problems = [f"key {key!r} is a {type(key).__name__}, wanted a string" for key in mapping if not isinstance(key, str)]
    if not takes_any_keyword(model):
        problems += [
            f"forward takes no {key!r} (given {_brief(value)}); it takes {_listed(keywords)}: remove or rename the key"
            for key, value in mapping.items()
            if isinstance(key, str) and key not in keywords
        ]
    problems += [
        f"forward requires {k.name!r}: add it to example_inputs" for k in keywords.values() if k.required and k.name not in mapping
    ]
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))


def _base(facts: Facts) -> list[str]:
    """The keywords of the plain forward: what is required, what the model calls its main input, what must go along."""
    names = [k.name for k in facts.keywords.values() if k.required]
    main = getattr(facts.model, "main_input_name", "input_ids")
    if isinstance(main, str) and main not in VALUES and facts.is_encoder_decoder and callable(getattr(facts.model, "get_encoder", None)):
        main = getattr(facts.model.get_encoder(), "main_input_name", main)  # of a model that is put together of two
    candidates = [main] if isinstance(main, str) else list(main or [])
    two_towers = facts.takes("input_ids", "pixel_values") and not facts.generates and facts.image_token is None
    if facts.takes("input_ids") and (facts.generates or two_towers) and not facts.is_encoder_decoder:
        candidates = ["input_ids", *(["pixel_values"] if two_towers else [])]
    candidates += ["decoder_input_ids"] if facts.is_encoder_decoder else []
    names += [name for name in candidates if facts.takes(name) and name not in names]
    if not names:
        names += [name for name in VALUES if facts.takes(name)][:1]
    names += [name for name in _companions(facts, names) if name not in names]
    more = (name for name in facts.guess.more if facts.method == "forward" or facts.takes(name))
    return names + [name for name in more if name not in names]


def _companions(facts: Facts, names: list[str]) -> Iterator[str]:
    """Keywords with a default of None without which one of `names` cannot be read."""
    wanted = {
        "pixel_values": ("image_grid_thw", "grid_thw", "spatial_shapes", "merge_sizes", "image_merge_sizes", "target_sizes"),
        "pixel_values_videos": ("video_grid_thw", "video_merge_sizes"),
        "past_values": ("past_time_features", "past_observed_mask", "future_values", "future_time_features"),
        "input_ids": ("bbox",),
    }
    for name in names:
        for other in wanted.get(name, ()):
            if facts.takes(other):
                yield other
    if "spatial_shapes" in facts.keywords and "pixel_values" in names and facts.takes("pixel_attention_mask"):
        yield "pixel_attention_mask"


def _examples(facts: Facts, base: list[str]) -> Iterator[Example]:
    images_in_text = {"input_ids", "pixel_values"} <= set(base) and facts.image_token is not None

    def call(*more: str, **options: object) -> Callable[[], Inputs]:
        if images_in_text:
            return lambda: with_medium(facts, tuple(base), IMAGES) | options
        return lambda: {name: value_of(facts, name) for name in (*base, *more)} | options

    yield Example("forward", call())
    reads_text = "input_ids" in base
    mask: tuple[str, ...] = ("attention_mask",) if reads_text and facts.takes("attention_mask") else ()
    cached = (facts.takes("use_cache") or (facts.generates and facts.any_keyword)) and facts.find("use_cache") is not False
    without: dict[str, object] = {"use_cache": False} if cached else {}  # as people train
    if mask and mask[0] not in base:
        yield Example("mask", call(*mask, **without), optional=True)
    mask = tuple(m for m in mask if m not in base)
    if cached and facts.generates and {"input_ids", "decoder_input_ids"} & set(base):
        yield Example("prefill", call(*mask, use_cache=True, **_asked(facts)), partial(_decode, facts, base, mask), optional=True)
    given = labels(facts)
    if given is not None:
        heard = mask or (("attention_mask",) if facts.takes("attention_mask") and "input_features" in base else ())
        yield Example("labels", lambda: call(*heard, **without)() | given(), optional=True)
    for flag in facts.flags("loss"):
        yield Example(flag, call(**{flag: True}), optional=True)
    yield from internals(facts, call)
    for medium in (IMAGES, AUDIO):
        value = medium.value(facts)
        if reads_text and value is not None and value not in base:
            yield Example(medium.name, partial(with_medium, facts, tuple(base), medium), optional=True, sought=True)


def _asked(facts: Facts) -> Inputs:
    """What generation asks of each call beside a cache, where the forward names it."""
    return {"return_dict": True} if facts.takes("return_dict") else {}


def internals(facts: Facts, call: Callable[..., Callable[[], Inputs]]) -> Iterator[Example]:
    """The call that asks for hidden states, and for attention weights: some models compute those whatever attention they run."""
    hidden = facts.any_keyword or facts.takes("output_hidden_states")
    weights = facts.any_keyword or facts.takes("output_attentions")
    if hidden and weights:
        yield Example("attentions", call(output_attentions=True, output_hidden_states=True), optional=True)
    elif hidden:
        yield Example("hidden_states", call(output_hidden_states=True), optional=True)


def _features(model: nn.Module, guess: Guess) -> Iterator[Example]:
    """The public methods that answer one kind of input alone (`get_image_features`), as far as their inputs can be made."""
    for name in sorted(n for n in dir(type(model)) if _FEATURES.fullmatch(n)):
        facts = Facts(model, name, guess)
        base = _base(facts)
        if base and all(why_not(facts, key) is None for key in base):
            yield Example(name, partial(_values, facts, base), optional=True, method=name, sought=True)


def _generators(model: nn.Module) -> Iterator[Example]:
    """The inner models that a `generate` of the model's own may hand the generation to: their calls with a cache."""
    from transformers import GenerationMixin

    if getattr(type(model), "generate", GenerationMixin.generate) is GenerationMixin.generate:
        return
    for path, inner in model.named_modules():
        if inner is not model and is_hugging_face(inner) and inner.can_generate():
            facts = Facts(inner)
            base = _base(facts)
            if all(why_not(facts, key) is None for key in base):
                found = (e for e in _examples(facts, base) if e.name == "prefill")
                yield from (replace(e, name=f"{path} prefill", quiet=True, method=path) for e in found)


def _encoder(model: nn.Module) -> Iterator[Example]:
    """The encoder of a model that is put together of two: generation calls it by itself, so what the decoder leaves unread is whole too."""
    if not getattr(model.config, "is_encoder_decoder", False) or not callable(getattr(model, "get_encoder", None)):
        return
    encoder: Any = cast(Any, model).get_encoder()
    path = next((path for path, module in model.named_modules() if module is encoder), "")
    if path and is_hugging_face(encoder) and type(encoder.config) is not type(model.config):
        facts = Facts(encoder)
        base = _base(facts)
        if base and all(why_not(facts, key) is None for key in base):
            yield Example(f"{path} forward", partial(_values, facts, base), optional=True, quiet=True, method=path)


def _values(facts: Facts, names: list[str]) -> Inputs:
    return {name: value_of(facts, name) for name in names}


def _decode(facts: Facts, base: list[str], mask: tuple[str, ...], outputs: Any) -> Inputs | None:
    """The second step: the cache in `outputs` and one more token; the encoder's states instead of its inputs.

    A decoder that takes a cache and returns none keeps its state in its modules: generation hands it a cache of its own.
    """
    names = [n for n in ("past_key_values", "cache_params") if facts.takes(n) and getattr(outputs, n, None) is not None]
    if not names:
        named = not facts.is_encoder_decoder and facts.takes("past_key_values") and isinstance(outputs, Mapping)
        if not named or "past_key_values" in vars(outputs):
            return None
        from transformers import DynamicCache

        own = DynamicCache(config=facts.config)
        return {"input_ids": token_ids(facts, BATCH, 1), "past_key_values": own, "use_cache": True} | _asked(facts)
    step: Inputs = {names[0]: getattr(outputs, names[0]), "use_cache": True} | _asked(facts)
    token = token_ids(facts, BATCH, 1)
    encoded = getattr(outputs, "encoder_last_hidden_state", None)
    if facts.is_encoder_decoder:
        step["decoder_input_ids"] = token
        if facts.takes("encoder_outputs") and isinstance(encoded, Tensor):
            from transformers.modeling_outputs import BaseModelOutput

            states: Any = BaseModelOutput(last_hidden_state=encoded)
            states.attention_mask = states.router_logits = None  # what some encoders answer besides, read by their decoders
            step["encoder_outputs"] = states
        else:
            step |= {name: value_of(facts, name) for name in base if name != "decoder_input_ids"}
        return step | {name: value_of(facts, name) for name in mask}
    step["input_ids"] = token
    for name in mask:
        given = value_of(facts, name)
        assert isinstance(given, Tensor)
        step[name] = torch.cat([given, given.new_ones(BATCH, 1)], dim=1)
    kept = [n for n in base if n not in ("input_ids", *mask)]
    return step | {name: value_of(facts, name) for name in kept if name != "bbox"}


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def calls_to_trace(model: nn.Module, inputs: Given | None) -> tuple[Example, ...]:
    """The caller's example first; a transformers model's own paths are traced too, as far as they can be."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    if inputs is None:
        return calls_with(model, None)
    return _in_settings(model, _with_own(model, user_examples(model, inputs), inputs, dtype))


def calls_with(model: nn.Module, guess: Guess | None) -> tuple[Example, ...]:
    """A transformers model's own paths, of the forms of `guess`.

    Raises:
        InputError: as for `example_inputs`.
    """
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return _in_settings(model, tuple(_in_dtype(e, dtype) for e in example_inputs(model, guess)))


def _in_settings(model: nn.Module, examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """The examples, and the first of them in each setting of the model's adapters."""
    first = replace(examples[0], decode=None, optional=True)
    return (*examples, *(replace(first, name=f"{first.name} with {s.name}", setting=s) for s in settings(model)))


def _with_own(model: nn.Module, given: tuple[Example, ...], inputs: Given, dtype: torch.dtype) -> tuple[Example, ...]:
    """The caller's examples, and those of a transformers model."""
    if not is_hugging_face(model):
        return given
    try:
        own = tuple(_in_dtype(e, dtype) for e in example_inputs(model))
    except InputError:
        return (*given, *user_internals(model, inputs))
    # The own call for attentions serves for a caller's that gives what it gives, and more.
    more = () if own[0].inputs.keys() <= given[0].inputs.keys() else user_internals(model, inputs)
    return (*given, *more, *(replace(e, optional=True) for e in own))


def settled(examples: tuple[Example, ...]) -> Iterator[Example]:
    """The examples with their inputs made once, so that every run sees the same; the first, or all of the caller's, in training too."""
    first = [e for e in examples if e is examples[0] or not e.optional or e.setting is not None]
    for example in (*examples, *(replace(e, name=e.name + "-training", decode=None, optional=True, training=True) for e in first)):
        try:
            made = example.make()
        except Exception:
            if not example.optional:
                raise
            continue
        yield replace(example, make=partial(_again, made))


def _again(made: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call, with lists, dicts and other objects of their own: the call may put something into them."""
    found = dict(made)
    for name, value in made.items():
        if not isinstance(value, torch.Tensor):
            try:
                found[name] = copy.deepcopy(value)
            except Exception:  # an object may refuse in any way; it is then the one that was given
                continue
    return found


def _in_dtype(example: Example, dtype: torch.dtype) -> Example:
    """The example with its floating-point inputs in the model's dtype."""

    def cast(tree: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

    return replace(example, make=lambda: cast(example.make()))
