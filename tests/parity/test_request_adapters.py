"""Many adapters in one batch: each request's answer is that of its adapter alone, by PEFT and by the ordinary way."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arriero.adapters.lora import LoRAConfig, adapter_state, apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft, to_peft
from arriero.adapters.prefix import PrefixConfig, apply_prefix
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.background import BackgroundEngine
from arriero.engine.draft_model import DraftModel
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.loading import load, load_for_inference
from arriero.engine.request_adapters import NO_ADAPTER, AdapterPool
from arriero.engine.runner import TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import ConfigError, FormatError, GenerationError
from arriero.formats import hf
from arriero.formats import peft as peft_files
from arriero.models.llama import LlamaForCausalLM

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer  # noqa: E402
from twin_models import twin_models  # noqa: E402

VOCABULARY = 256
SHARED = list(range(20, 60))
PROMPTS = [[1, 2, 3], [*SHARED, 81], [9, 8, 9, 8, 9, 8, 9]]
NEW = 12
PARAMS = SamplingParams(max_new_tokens=NEW)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,  # nf4 rounds blocks of 64
    "intermediate_size": 128,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}
LORA: dict[str, dict[str, Any]] = {
    "q and v": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
    "feed-forward": {"r": 5, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "own biases": {"r": 2, "lora_alpha": 4, "bias": "lora_only", "target_modules": ["k_proj", "down_proj"]},
    "dora, biases": {"r": 3, "lora_alpha": 6, "use_dora": True, "bias": "all", "target_modules": ["o_proj", "up_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    },
}
PREFIX_LENGTH = 5


@dataclass
class Zoo:
    """A base model with adapters, as folders, and what PEFT makes of them.

    Attributes:
        folders: of adapters by name.
        wanted: greedy tokens after each prompt, by adapter; under None the base's.
        logits: (tokens, vocabulary) of each prompt, by adapter.
    """

    base: Path
    model: LlamaForCausalLM
    tokenizer: Tokenizer
    folders: dict[str, Path]
    wanted: dict[str | None, list[list[int]]]
    logits: dict[str | None, list[Tensor]]

    def pool(self, **options: Any) -> AdapterPool:
        pool = AdapterPool(self.model, **options)
        for name, folder in self.folders.items():
            pool.load(keys(name), folder)
        return pool

    def engine(self, pool: AdapterPool, *, block_size: int = 16, tokens: int = 4096, **options: Any) -> Engine:
        runner = TorchRunner(self.model, block_size=block_size, max_tokens=tokens, adapters=pool)
        return Engine(runner, self.tokenizer, **options)

    def cases(self) -> list[tuple[str | None, int]]:
        """Every adapter and None with every prompt, so that neighbours differ."""
        return [(name, number) for number in range(len(PROMPTS)) for name in self.wanted]


def keys(name: str) -> str:
    return name.replace(", ", "/").replace(" ", "-")


@torch.no_grad()
def twins() -> tuple[LlamaForCausalLM, Any]:
    """Matrices so large that answers differ."""
    ours, theirs = twin_models(**SHAPE)
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    return ours, theirs


@torch.no_grad()
def randomise(model: nn.Module, seed: int, size: float = 0.4) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@torch.no_grad()
def truth(theirs: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens without any cache, and the prompts' logits."""
    answers, logits = [], []
    for prompt in PROMPTS:
        tokens = list(prompt)
        logits.append(theirs(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :])
        for _ in range(NEW):
            tokens.append(int(theirs(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers, logits


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("zoo")
    ours, theirs = twins()
    hf.save_model(ours, ours.config, root / "base")
    write_byte_tokenizer(root / "base")
    zoo = Zoo(root / "base", ours, load_tokenizer(root / "base"), {}, {}, {})
    zoo.wanted[None], zoo.logits[None] = truth(theirs)
    for seed, (name, settings) in enumerate(LORA.items()):
        _, theirs = twins()
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        randomise(wrapped, seed)
        zoo.folders[name] = root / keys(name).replace("/", "-")
        wrapped.save_pretrained(str(zoo.folders[name]))
        zoo.wanted[name], zoo.logits[name] = truth(wrapped)
    _, theirs = twins()
    wrapped = peft.get_peft_model(
        theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LENGTH)
    ).eval()
    randomise(wrapped, 77, 0.7)
    zoo.folders["prefix"] = root / "prefix"
    wrapped.save_pretrained(str(zoo.folders["prefix"]))
    zoo.wanted["prefix"], zoo.logits["prefix"] = truth(wrapped)
    pissa = twins()[0]
    config = LoRAConfig(rank=3, alpha=6.0, pissa=True, target_modules=("v_proj", "down_proj"))
    apply_lora(pissa, config)
    randomise(pissa, 78, 0.05)
    zoo.folders["pissa"] = root / "pissa"
    peft_files.save_adapter(zoo.folders["pissa"], adapter_state(pissa), to_peft(config, "base"))
    _, theirs = twins()
    wrapped = peft.PeftModel.from_pretrained(theirs, str(zoo.folders["pissa"])).eval()
    zoo.wanted["pissa"], zoo.logits["pissa"] = truth(wrapped)
    answers = [tuple(itertools.chain(*answer)) for answer in zoo.wanted.values()]
    assert len(set(answers)) == len(answers), "every adapter must answer in its own way"
    return zoo


def run_all(zoo: Zoo, pool: AdapterPool, work: Sequence[tuple[str | None, list[int]]]) -> list[Tensor]:
    """The logits of whole prompts in one forward pass."""
    runner = TorchRunner(zoo.model, block_size=4, max_tokens=4096, adapters=pool)
    numbers = [NO_ADAPTER if name is None else pool.find(keys(name)).number for name, _ in work]
    assert not pool.prepare(set(numbers) - {NO_ADAPTER})
    items, at = [], 0
    for (_, prompt), number in zip(work, numbers, strict=True):
        start = 0
        blocks = list(range(at, at + 20))
        prefix = pool.prefix(number) if number else None
        if prefix is not None:
            start = prefix.length
            runner.begin(blocks, 0, start, number)
        items.append(Work(prompt, start, blocks, len(prompt), number))
        at += 20
    return list(torch.split(runner.run(items), [len(prompt) for _, prompt in work]))


@pytest.mark.parametrize("joined", [False, True], ids=["one by one", "side by side"])
def test_logits_of_a_mixed_batch_are_pefts(zoo: Zoo, joined: bool) -> None:
    pool = zoo.pool()
    # side by side where a step has few tokens, and its adapters are those of the step before
    prompt = 0 if joined else 1
    work: list[tuple[str | None, list[int]]] = [(name, PROMPTS[prompt]) for name in zoo.wanted]
    work += work[::-3]
    for _ in range(2 if joined else 1):
        found = run_all(zoo, pool, work)
    assert (pool.nbytes > sum(adapter.nbytes for adapter in pool.adapters)) == joined
    for (name, _), logits in zip(work, found, strict=True):
        assert float((logits - zoo.logits[name][prompt]).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("name", [*LORA, "pissa", "prefix"])
def test_an_adapter_alone_is_the_merged_model(zoo: Zoo, name: str) -> None:
    path = str(zoo.folders[name])
    options = AdapterPathOptions(prefix_path=path) if name == "prefix" else AdapterPathOptions(lora_path=path)
    loaded = load_for_inference(ModelOptions(model_name_or_path=str(zoo.base), device="cpu"), options)
    alone = Engine(TorchRunner(loaded.model, max_tokens=1024), zoo.tokenizer)
    pool = AdapterPool(zoo.model)
    pool.load("it", zoo.folders[name])
    together = zoo.engine(pool).generate(PROMPTS, PARAMS, adapters="it")
    for prompt, answer, wanted in zip(PROMPTS, together, zoo.wanted[name], strict=True):
        assert alone.generate([prompt], PARAMS)[0].token_ids == answer.token_ids == wanted


@pytest.mark.parametrize("guess", ["no", "lookup", "draft"])
@pytest.mark.parametrize(
    ("budget", "running", "tokens", "loaded", "block_size", "cache"),
    [
        (2048, 40, 8192, 16, 16, False),
        (2048, 16, 8192, 16, 1, True),
        (7, 3, 4096, 2, 4, True),
        (24, 8, 180, 16, 16, True),
        (24, 8, 100, 3, 1, False),
    ],
    ids=str,
)
def test_a_mixed_batch_is_each_alone_in_every_circumstance(
    zoo: Zoo, budget: int, running: int, tokens: int, loaded: int, block_size: int, cache: bool, guess: str
) -> None:
    cases = zoo.cases() * 2
    speculation = None
    if guess == "lookup":
        speculation = Speculation(PromptLookup(longest=2, shortest=1), tokens=3, window=10**9)
    elif guess == "draft":  # the base, which knows of no adapter: some of its guesses are right
        speculation = Speculation(DraftModel(TorchRunner(zoo.model, max_tokens=8192), VOCABULARY), window=10**9)
    pool = zoo.pool(max_loaded=loaded)
    engine = zoo.engine(
        pool,
        block_size=block_size,
        tokens=tokens,
        max_running=running,
        max_step_tokens=budget,
        prefix_cache=cache,
        speculation=speculation,
    )
    answers = engine.generate(
        [PROMPTS[number] for _, number in cases],
        PARAMS,
        adapters=[None if name is None else keys(name) for name, _ in cases],
    )
    for (name, number), answer in zip(cases, answers, strict=True):
        assert answer.token_ids == zoo.wanted[name][number], (name, number)
    engine.blocks.check([])
    assert all(adapter.requests == 0 for adapter in pool.adapters)
    assert sum(adapter.weights is not None for adapter in pool.adapters) <= loaded
    if tokens < 1000:
        assert engine.scheduler.preemptions > 0
    elif (
        cache
    ):  # the second time everything but the last token is there, and the first time nothing of another adapter's
        half = len(cases) // 2
        held = [PREFIX_LENGTH if name == "prefix" else 0 for name, _ in cases]
        full = [
            max(0, (len(PROMPTS[number]) - 1 + length) // block_size * block_size - length)
            for (_, number), length in zip(cases, held, strict=True)
        ]
        assert [answer.cached_tokens for answer in answers] == [0] * half + full[half:]
    if speculation is not None and tokens > 1000:
        assert speculation.counters.accepted > 0


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_base_in_few_bits_takes_adapters(zoo: Zoo, scheme: str) -> None:
    options = ModelOptions(model_name_or_path=str(zoo.base), device="cpu")
    base = load(options, quantize_base=scheme).model.eval().requires_grad_(False)
    pool = AdapterPool(base)
    pool.load("a", zoo.folders["all linear"])
    pool.load("d", zoo.folders["dora, biases"])
    engine = Engine(TorchRunner(base, max_tokens=1024, adapters=pool), zoo.tokenizer)
    answers = engine.generate([PROMPTS[1]] * 3, PARAMS, adapters=["a", "d", None])
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    for answer, name in zip(answers, ("all linear", "dora, biases"), strict=False):
        alone = load(options, quantize_base=scheme).model.eval()
        stored, state = peft_files.load_adapter(zoo.folders[name])
        apply_lora(alone, from_peft(stored), fresh=False)
        load_adapter_state(alone, state)
        wanted = Engine(TorchRunner(alone.requires_grad_(False), max_tokens=1024), zoo.tokenizer)
        assert answer.token_ids == wanted.generate([PROMPTS[1]], PARAMS)[0].token_ids


def test_cached_beginnings_are_never_anothers(zoo: Zoo, tmp_path: Path) -> None:
    pool = AdapterPool(zoo.model)
    folder = tmp_path / "adapter"
    shutil.copytree(zoo.folders["q and v"], folder)
    first = pool.load("a", folder)
    pool.load("b", zoo.folders["feed-forward"])
    pool.load("p", zoo.folders["prefix"])
    engine = zoo.engine(pool, block_size=4)
    truths = {"a": "q and v", "b": "feed-forward", "p": "prefix", None: None}
    for again in range(2):
        for key, name in truths.items():
            [answer] = engine.generate([PROMPTS[1]], PARAMS, adapters=key)
            assert answer.token_ids == zoo.wanted[name][1]
            assert (answer.cached_tokens >= 39) == bool(again)
    shutil.rmtree(folder)
    shutil.copytree(zoo.folders["all linear"], folder)
    second = pool.load("a", folder)
    assert second.number != first.number
    assert pool.adapters.count(first) == 0
    [answer] = engine.generate([PROMPTS[1]], PARAMS, adapters="a")
    assert answer.token_ids == zoo.wanted["all linear"][1]
    assert answer.cached_tokens == 0
    salts = {first.salt(b""), second.salt(b""), first.salt(b"tenant"), pool.find("b").salt(b""), b"", b"tenant"}
    assert len(salts) == 6


def test_what_is_given_up_is_read_again_if_it_is_the_same(zoo: Zoo, tmp_path: Path) -> None:
    pool = AdapterPool(zoo.model, max_loaded=2)
    folders = {}
    for key, name in {"a": "q and v", "b": "feed-forward", "c": "dora"}.items():
        folders[key] = tmp_path / key
        shutil.copytree(zoo.folders[name], folders[key])
        pool.load(key, folders[key])
    held = {adapter.name for adapter in pool.adapters if adapter.weights is not None}
    assert held == {"b", "c"}, "the one used longest ago goes first"
    assert pool.nbytes == pool.find("b").nbytes + pool.find("c").nbytes
    engine = zoo.engine(pool, block_size=4)
    [answer] = engine.generate([PROMPTS[1]], PARAMS, adapters="a")
    assert answer.token_ids == zoo.wanted["q and v"][1]
    assert {adapter.name for adapter in pool.adapters if adapter.weights is not None} == {"a", "c"}

    [again] = engine.generate([PROMPTS[1]], PARAMS, adapters="b")
    assert again.token_ids == zoo.wanted["feed-forward"][1]
    # a and b are held now; c changes meanwhile: another strength, other weights, nothing at all
    changes = [
        lambda: rewrite(folders["c"], {"lora_alpha": 7}),
        lambda: shutil.copytree(zoo.folders["q and v"], folders["c"], dirs_exist_ok=True),
        lambda: shutil.rmtree(folders["c"]),
    ]
    other = "holds another adapter than the one that was loaded: load it again"
    for change, expected in zip(changes, (other, other, "json: cannot be read"), strict=True):
        change()
        answers = [engine.submit(PROMPTS[1], PARAMS, adapter=key) for key in ("c", "a", "c")]
        while engine.unfinished:
            engine.step()
        assert [answer.finish_reason for answer in answers] == ["error", "length", "error"]
        assert answers[0].error.startswith("adapter 'c' cannot be read again: ")
        assert expected in answers[0].error
        assert "\n" not in answers[0].error
        assert answers[1].token_ids == zoo.wanted["q and v"][1]
    engine.blocks.check([])
    assert all(adapter.requests == 0 for adapter in pool.adapters)


def test_more_adapters_than_places_wait_in_order(zoo: Zoo) -> None:
    pool = zoo.pool(max_loaded=1)
    engine = zoo.engine(pool, max_running=4)
    order = [
        engine.submit(PROMPTS[0], PARAMS, adapter=key) for key in ("q-and-v", "rslora", "rslora", "q-and-v", "dora")
    ]
    order.append(engine.submit(PROMPTS[0], PARAMS))
    finished: list[int] = []
    while engine.unfinished:
        for answer in engine.step():
            if answer.finish_reason is not None:
                finished.append(order.index(answer))
        running = {request.adapter for request in engine.scheduler.running} - {NO_ADAPTER}
        assert len(running) <= 1
        assert sum(adapter.weights is not None for adapter in pool.adapters) <= 1
    assert finished == [0, 1, 2, 3, 4, 5]
    names = ["q and v", "rslora", "rslora", "q and v", "dora", None]
    assert [answer.token_ids for answer in order] == [zoo.wanted[name][0] for name in names]


def test_an_adapter_in_use_stays_for_those_that_use_it(zoo: Zoo) -> None:
    pool = AdapterPool(zoo.model, max_loaded=2)
    pool.load("a", zoo.folders["q and v"])
    engine = zoo.engine(pool)
    old = engine.submit(PROMPTS[0], PARAMS, adapter="a")
    engine.step()
    replaced = pool.find("a")
    pool.load("a", zoo.folders["dora"])  # another of the same name
    new = engine.submit(PROMPTS[0], PARAMS, adapter="a")
    engine.step()
    pool.load("b", zoo.folders["rslora"])  # there is no room for its weights now
    assert pool.find("b").weights is None
    assert replaced.weights is not None
    pool.unload("a")
    with pytest.raises(GenerationError, match=r"^there is no adapter 'a': there are b$"):
        engine.submit(PROMPTS[0], PARAMS, adapter="a")
    while engine.unfinished:
        engine.step()
    assert old.token_ids == zoo.wanted["q and v"][0]
    assert new.token_ids == zoo.wanted["dora"][0]
    assert replaced.weights is None
    assert [adapter.name for adapter in pool.adapters] == ["b"]
    assert pool.nbytes == 0
    cancelled = engine.submit(PROMPTS[0], PARAMS, adapter="b")
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    assert pool.find("b").requests == 0


def test_loading_and_unloading_while_others_run(zoo: Zoo) -> None:
    pool = AdapterPool(zoo.model, max_loaded=2)
    background = BackgroundEngine(zoo.engine(pool, max_running=4))
    try:
        base = [background.submit(PROMPTS[1], SamplingParams(max_new_tokens=60)) for _ in range(3)]
        for _ in range(3):
            for name in ("q and v", "dora", "prefix", "feed-forward"):
                background.load_adapter("x", zoo.folders[name])
                tickets = [background.submit(prompt, PARAMS, adapter="x") for prompt in PROMPTS]
                background.unload_adapter("x")
                refused = background.submit(PROMPTS[0], PARAMS, adapter="x")
                assert [ticket.result().token_ids for ticket in tickets] == zoo.wanted[name]
                with pytest.raises(GenerationError, match="no adapter 'x': none is loaded"):
                    refused.result()
        assert {tuple(ticket.result().token_ids[:NEW]) for ticket in base} == {tuple(zoo.wanted[None][1])}
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            background.load_adapter("x", zoo.base)
        with pytest.raises(GenerationError, match="no adapter 'x'"):
            background.unload_adapter("x")
        assert background.call(lambda engine: engine.runner.adapters.names) == ()
    finally:
        background.close()
    assert pool.nbytes == 0
    with pytest.raises(GenerationError, match="shutting down"):
        background.unload_adapter("x")


def test_a_prefix_takes_room_of_its_own_request_only(zoo: Zoo) -> None:
    pool = AdapterPool(zoo.model)
    pool.load("p", zoo.folders["prefix"])
    engine = zoo.engine(pool)
    fits = [1] * (128 - NEW)
    engine.generate([fits], PARAMS)
    engine.generate([fits[PREFIX_LENGTH:]], PARAMS, adapters="p")
    with pytest.raises(GenerationError, match=f"max_position_embeddings, 128 less a prefix of {PREFIX_LENGTH}"):
        engine.submit(fits[PREFIX_LENGTH - 1 :], PARAMS, adapter="p")


def test_a_models_own_prefix_goes_with_low_rank_adapters_only(zoo: Zoo) -> None:
    ours, _ = twins()
    apply_prefix(ours, PrefixConfig(length=3), seed=4)
    ours.requires_grad_(False)
    pool = AdapterPool(ours)
    with pytest.raises(ConfigError, match="the model has a prefix already"):
        pool.load("p", zoo.folders["prefix"])
    pool.load("a", zoo.folders["all linear"])
    engine = Engine(TorchRunner(ours, max_tokens=1024, adapters=pool), zoo.tokenizer)
    [with_adapter] = engine.generate([PROMPTS[0]], PARAMS, adapters="a")
    options = AdapterPathOptions(lora_path=str(zoo.folders["all linear"]))
    loaded = load_for_inference(ModelOptions(model_name_or_path=str(zoo.base), device="cpu"), options)
    apply_prefix(loaded.model, PrefixConfig(length=3), seed=4)
    alone = Engine(TorchRunner(loaded.model.eval(), max_tokens=1024), zoo.tokenizer)
    assert with_adapter.token_ids == alone.generate([PROMPTS[0]], PARAMS)[0].token_ids


def broken(folder: Path, source: Path, change: Any = None, config: dict[str, Any] | None = None) -> Path:
    shutil.copytree(source, folder)
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        rewrite(folder, config)
    return folder


def rewrite(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_what_cannot_be_loaded_is_refused_in_one_line(zoo: Zoo, tmp_path: Path) -> None:
    pool = AdapterPool(zoo.model, max_rank=8)

    def refuses(folder: Path, error: type[Exception], words: str, name: str = "x") -> None:
        with pytest.raises(error, match=words) as caught:
            pool.load(name, folder)
        assert "\n" not in str(caught.value)
        assert pool.names == ()
        assert pool.nbytes == 0

    good = zoo.folders["q and v"]
    for name in ("", "../a", "a/../b", "/a", "a//b", "a b", "a\n", "a\0", ".", "a" * 129, "é"):
        refuses(good, GenerationError, "is no name for an adapter", name)
    refuses(tmp_path, FormatError, "adapter_config.json: cannot be read")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    nan = broken(tmp_path / "nan", good, lambda t: t[f"{layer}.lora_A.weight"].fill_(float("nan")))
    refuses(nan, ConfigError, "layer 0 self_attn.q_proj holds numbers that are not finite")
    other = broken(tmp_path / "other", good, lambda t: t.update({f"{layer}.lora_A.weight": torch.zeros(8, 33)}))
    refuses(other, FormatError, "does not fit the model: .*is it for another base model")
    less = broken(tmp_path / "less", good, lambda t: [t.pop(name) for name in [*t] if name.startswith(layer)])
    refuses(less, FormatError, "lora_A.weight is missing")
    large = broken(tmp_path / "large", good, config={"r": 9})
    refuses(large, ConfigError, "rank is 9 and max_rank 8: raise it, or merge")
    pattern = broken(tmp_path / "pattern", good, config={"rank_pattern": {"q_proj": 2**40}})
    refuses(pattern, ConfigError, "max_rank 8")
    embedded = broken(tmp_path / "embedded", good, config={"modules_to_save": ["embed_tokens"]})
    refuses(embedded, FormatError, "modules_to_save")
    rounded = broken(tmp_path / "rounded", good)
    (rounded / "qat.json").write_text("{}")
    refuses(rounded, ConfigError, "trained with rounded weights")
    short = broken(tmp_path / "short", zoo.folders["prefix"], config={"num_layers": 3})
    refuses(short, FormatError, "3 layers")

    head = twins()[0]
    config = LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj", "lm_head"))
    apply_lora(head, config)
    peft_files.save_adapter(tmp_path / "head", adapter_state(head), to_peft(config, "base"))
    refuses(tmp_path / "head", ConfigError, "lm_head is adapted, and only .*--lora_path")
    for options in ({"max_loaded": 0}, {"max_rank": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            AdapterPool(zoo.model, **options)
    with pytest.raises(ConfigError, match="one process holds"):
        AdapterPool(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="another model"):
        TorchRunner(twins()[0], max_tokens=64, adapters=pool)


def test_a_request_for_an_unknown_adapter_is_refused_alone(zoo: Zoo) -> None:
    pool = AdapterPool(zoo.model)
    engine = zoo.engine(pool)
    with pytest.raises(GenerationError, match=r"no adapter 'x': none is loaded"):
        engine.submit(PROMPTS[0], PARAMS, adapter="x")
    pool.load("a", zoo.folders["q and v"])
    running = engine.submit(PROMPTS[0], PARAMS, adapter="a")
    with pytest.raises(GenerationError, match=r"prompt 1: there is no adapter 'x': there are a$"):
        engine.generate(PROMPTS, PARAMS, adapters=["a", "x", None])
    with pytest.raises(GenerationError, match="3 prompts and 1 adapters"):
        engine.generate(PROMPTS, PARAMS, adapters=["a"])
    while engine.unfinished:
        engine.step()
    assert running.token_ids == zoo.wanted["q and v"][0]
    assert pool.find("a").requests == 0
    plain = Engine(TorchRunner(zoo.model, max_tokens=64), zoo.tokenizer)
    with pytest.raises(GenerationError, match="this engine has none at all"):
        plain.submit(PROMPTS[0], PARAMS, adapter="a")
