from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import streamrec as sr
from streamrec.models import AdamW, Full, LoRA, Pair, Top
from streamrec.models._pairs import augmented
from streamrec.preprocessors import encode
from streamrec.testing import check_model
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import Linear
from tests.models.tiny_bert import CHINESE, WORDS, changed, tiny_bert

SCHEMA = sr.Schema(sr.Id("user"), sr.Text("query"), sr.Text("title"))
QUICK = AdamW(lr=2e-3, batch_size=4, micro_batch=3)


def impressions(count: int, seed: int = 0) -> list[sr.Impression]:
    rng = np.random.default_rng(seed)
    shown = []
    for n in range(count):
        query = " ".join(rng.choice(WORDS, rng.integers(1, 4))) if n % 4 else None
        title = " ".join(rng.choice(WORDS, rng.integers(1, 9))) if n % 3 else "".join(rng.choice([*CHINESE], 7))
        features = {"query": query, "title": title}
        shown.append(sr.Impression(f"i{n}", 1e9 + n, f"u{n % 5}", f"p{n % 7}", features))
    return shown


SHOWN = impressions(24)
BATCH = encode(SCHEMA, SHOWN).batch
LABELS = np.array([n % 3 == 0 for n in range(len(SHOWN))], dtype=np.float32)
NEW = impressions(16, seed=1)
UNSEEN = encode(SCHEMA, NEW).batch


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), hidden=16)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without dropout, so that a plain loop can be followed."""
    return without_dropout(tiny_bert(tmp_path_factory.mktemp("still"), hidden=16))


def without_dropout(place: Path) -> Path:
    config = (place / "config.json").read_text(encoding="utf-8")
    config = config.replace('_dropout_prob": 0.1', '_dropout_prob": 0.0')
    (place / "config.json").write_text(config, encoding="utf-8")
    return place


def plain(place: Any, labels: int, batch: Any = BATCH) -> tuple[Any, dict[str, Any]]:
    """transformers' own model and a padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = AutoModelForSequenceClassification.from_pretrained(place, num_labels=labels).eval()
    texts = [*batch.texts, ""]
    columns = [[texts[ref] for ref in column] for column in batch.text_refs.T]
    return module, dict(AutoTokenizer.from_pretrained(place)(*columns, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("tune", [Full(), Top(1), Top(0), LoRA(2, dropout=0.1)], ids=lambda tune: type(tune).__name__)
def test_contract(tune: Any, folder: Path) -> None:
    rows = slice(0, 5)
    check_model(lambda: sr.BertCTR(SCHEMA, folder, tune=tune, optimizer=QUICK), BATCH.take(rows), LABELS[rows])


@pytest.mark.parametrize("labels", [1, 2])
def test_probabilities_are_those_of_transformers(labels: int, folder: Path, tmp_path: Path) -> None:
    model = sr.BertCTR(SCHEMA, folder, labels=labels, optimizer=QUICK)
    model.learn(BATCH, LABELS)
    model.save_pretrained(tmp_path / "saved")
    module, inputs = plain(tmp_path / "saved", labels, UNSEEN)
    with torch.no_grad():
        logits = module(**inputs).logits
    expected = logits.sigmoid()[:, 0] if labels == 1 else logits.softmax(dim=1)[:, 1]
    np.testing.assert_allclose(model.predict(UNSEEN), expected.numpy(), atol=1e-5)


def test_the_classic_recipe_is_a_special_case(still: Path) -> None:
    """Binary labels, two outputs, Adam with 1e-4: as a loop of torch and transformers does it."""
    classic = AdamW(lr=1e-4, batch_size=8, weight_decay=0.0, clip=None)
    ours = sr.BertCTR(SCHEMA, still, labels=2, optimizer=classic)
    module, inputs = plain(still, 2)
    module.load_state_dict(ours.module.state_dict())  # the head begins the same
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    wanted = torch.from_numpy(LABELS).long()
    first = ours.predict(BATCH)
    for _ in range(5):
        ours.learn(BATCH, LABELS)
        for begin in range(0, len(BATCH), 8):
            part = slice(begin, begin + 8)
            optimizer.zero_grad()
            logits = module(**{name: value[part] for name, value in inputs.items()}).logits
            functional.cross_entropy(logits, wanted[part]).backward()
            optimizer.step()
    with torch.no_grad():
        expected = module(**inputs).logits.softmax(dim=1)[:, 1].numpy()
    found = ours.predict(BATCH)
    assert ours.steps == 15
    moved = float(np.abs(found - first).max())
    assert moved > 1e-3
    np.testing.assert_allclose(found, expected, atol=moved / 50)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_others_of_the_family(kind: str, folder: Path, tmp_path: Path) -> None:
    """RoBERTa is packed too; what is built otherwise runs as transformers runs it. Both keep a row's result its own."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": 0}
    torch.manual_seed(0)
    base: Any
    if kind == "roberta":
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        base = RobertaModel(RobertaConfig(**sizes, **shape, type_vocab_size=1))
    else:
        base = DistilBertModel(DistilBertConfig(**sizes, dim=16, n_layers=2, n_heads=2, hidden_dim=32))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tune = Top(1) if kind == "roberta" else LoRA(2, targets=["q_lin", "v_lin"])
    models = [sr.BertCTR(SCHEMA, tmp_path, tune=tune, optimizer=QUICK) for _ in range(2)]
    before = torch.random.get_rng_state()
    models[0].learn(BATCH, LABELS)
    for row in range(len(BATCH)):
        models[1].learn(BATCH.take([row]), LABELS[row : row + 1])
    assert torch.equal(before, torch.random.get_rng_state())
    assert first_difference(models[0].state_dict(), models[1].state_dict()) is None
    together = models[0].predict(BATCH)
    alone = [models[0].predict(BATCH.take([row]))[0] for row in range(len(BATCH))]
    np.testing.assert_array_equal(together, np.array(alone))
    models[0].save_pretrained(tmp_path / "saved")
    module, inputs = plain(tmp_path / "saved", 1, UNSEEN)
    inputs = {name: value * 0 if name == "token_type_ids" else value for name, value in inputs.items()}
    if kind == "distilbert":
        inputs.pop("token_type_ids", None)
        with pytest.raises(sr.ConfigError, match=r"use Full\(\) or LoRA"):
            sr.BertCTR(SCHEMA, tmp_path, tune=Top(1))
    with torch.no_grad():
        np.testing.assert_allclose(
            models[0].predict(UNSEEN), module(**inputs).logits.sigmoid()[:, 0].numpy(), atol=1e-5
        )


def test_micro_batches_sum_to_the_step(still: Path) -> None:
    whole, parts = (
        sr.BertCTR(SCHEMA, still, optimizer=AdamW(lr=1e-3, batch_size=12, micro_batch=at_once)) for at_once in (None, 5)
    )
    for model in (whole, parts):
        model.learn(BATCH, LABELS)
        assert model.steps == 2
    np.testing.assert_allclose(whole.predict(BATCH), parts.predict(BATCH), atol=1e-4)


def test_chance_is_its_own(folder: Path) -> None:
    torch.manual_seed(7)
    global_state = torch.random.get_rng_state()
    first = sr.BertCTR(SCHEMA, folder, optimizer=QUICK)
    first.learn(BATCH, LABELS)
    assert torch.equal(global_state, torch.random.get_rng_state())
    torch.manual_seed(8)
    second = sr.BertCTR(SCHEMA, folder, optimizer=QUICK)
    other = sr.BertCTR(SCHEMA, folder, optimizer=QUICK, seed=1)
    other.load_state_dict(second.published())
    for model in (second, other):
        model.learn(BATCH, LABELS)
    assert first_difference(first.state_dict(), second.state_dict()) is None
    assert not np.array_equal(first.predict(BATCH), other.predict(BATCH))  # another seed, other dropout


def test_memory_that_runs_out_halves_what_goes_through_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tight(model: sr.BertCTR, most: int) -> sr.BertCTR:
        learn = model._runner.learn

        def narrow(rows: Any, *, bf16: bool) -> Any:
            found = learn(rows, bf16=bf16)
            if len(rows) > most:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")
            return found

        monkeypatch.setattr(model._runner, "learn", narrow)
        return model

    def make() -> sr.BertCTR:
        return sr.BertCTR(SCHEMA, folder, optimizer=AdamW(lr=1e-3, batch_size=8))

    model, twin = tight(make(), 2), tight(make(), 2)
    model.learn(BATCH, LABELS)
    assert (model.steps, model.halved) == (3, 2)
    free = sr.BertCTR(SCHEMA, folder, optimizer=AdamW(lr=1e-3, batch_size=8, micro_batch=2))
    free.learn(BATCH, LABELS)
    np.testing.assert_array_equal(model.predict(BATCH), free.predict(BATCH))  # the step began again, from its start
    twin.learn(BATCH.take(slice(0, 11)), LABELS[:11])
    resumed = make()
    resumed.load_state_dict(copy_state(twin.state_dict()))
    resumed.learn(BATCH.take(slice(11, None)), LABELS[11:])
    assert first_difference(resumed.state_dict(), model.state_dict()) is None
    with pytest.raises(RuntimeError, match="allocate"):
        tight(make(), 0).learn(BATCH, LABELS)

    def broken(rows: Any, *, bf16: bool) -> Any:
        raise RuntimeError("shapes differ")

    other = make()
    monkeypatch.setattr(other._runner, "learn", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        other.learn(BATCH, LABELS)
    assert other.halved == 0


def test_a_gradient_that_is_not_finite_moves_nothing(folder: Path) -> None:
    model = sr.BertCTR(SCHEMA, folder, optimizer=QUICK)
    before = model.predict(BATCH)
    hook = model.module.classifier.weight.register_hook(lambda gradient: gradient * float("nan"))
    model.learn(BATCH.take(slice(0, 5)), LABELS[:5])
    np.testing.assert_array_equal(model.predict(BATCH), before)
    assert (model.left_out, model.pending) == (4, 1)
    hook.remove()
    model.learn(BATCH, LABELS)
    assert model.left_out == 4
    assert not np.array_equal(model.predict(BATCH), before)


def test_what_lower_layers_made_is_kept_in_bounds_and_changes_nothing(folder: Path) -> None:
    room = 4000
    models = [sr.BertCTR(SCHEMA, folder, tune=Top(1, cache_bytes=size), optimizer=QUICK) for size in (1 << 20, room, 0)]
    for model in models:
        for _ in range(3):
            model.learn(BATCH, LABELS)
            model.predict(BATCH)
    roomy, narrow, none = (model.activations for model in models)
    distinct = len({tuple(row) for row in BATCH.text_refs.tolist()})
    assert (roomy.misses, len(roomy)) == (distinct, distinct)
    assert 0 < narrow.bytes <= room and narrow.misses > roomy.misses
    assert (len(none), none.bytes, none.hits) == (0, 0, 0)
    expected = models[0].predict(UNSEEN)
    for model in models[1:]:
        np.testing.assert_array_equal(model.predict(UNSEEN), expected)
    frozen = "bert.encoder.layer.0.attention.self.query.weight"
    assert frozen not in models[0].state_dict()["weights"]
    assert "bert.encoder.layer.1.attention.self.query.weight" in models[0].state_dict()["weights"]


def events(count: int) -> list[Any]:
    stream: list[Any] = []
    for n, shown in enumerate(impressions(count, seed=3)):
        stream.append(shown)
        if "red" in str(shown.features["title"]) or n % 5 == 0:
            stream.append(sr.Feedback(f"f{n}", shown.id, shown.time + 0.5))
    return stream


def trainer(model: sr.BertCTR, store: Any = None) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=model, join=sr.LabelJoin(windows={"click": 5.0}), metrics=[sr.LogLoss()], store=store, batch_size=7
    )


@pytest.mark.parametrize("tune", [Full(), Top(1)], ids=["full", "top"])
def test_the_same_trainer_store_and_scorer_as_any_model(tune: Any, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "bert"
    shutil.copytree(folder, place)

    def make() -> sr.BertCTR:
        return sr.BertCTR(SCHEMA, place, tune=tune, optimizer=QUICK)

    whole = trainer(make())
    report = whole.run(sr.Memory(events(40)))
    assert report.counts["learned"] >= 30
    singly = trainer(make())
    scores = [score for event in events(40) for score in singly.push([event])]
    twin = trainer(make())
    assert scores == twin.push(events(40))
    assert first_difference(singly.model.state_dict(), twin.model.state_dict()) is None

    store = sr.Store(tmp_path / "store")
    trainer(make(), store).run(sr.Memory(events(40)), limit=31)
    resumed = trainer(make(), store)
    again = resumed.run(sr.Memory(events(40)))
    assert again.metrics == report.metrics
    assert first_difference(whole.model.state_dict(), resumed.model.state_dict()) is None

    shutil.rmtree(place)  # a service has the store alone
    scorer = sr.Scorer(store)
    np.testing.assert_array_equal(scorer.score(NEW), whole.model.predict(UNSEEN))
    ranked = scorer.rank(
        user="u1",
        candidates=[sr.Candidate(f"p{n}", {"title": WORDS[n]}) for n in range(6)],
        k=2,
        features={"query": "red"},
    )
    assert len(ranked) == 2 and ranked[0].score >= ranked[1].score


def test_an_archive_first_with_a_schedule(folder: Path) -> None:
    model = sr.BertCTR(SCHEMA, folder, optimizer=QUICK)
    shown = impressions(40, seed=3)
    labeled = [sr.Labeled(one, float("red" in str(one.features["title"]))) for one in shown]
    batch = sr.BatchTrainer(model=model, epochs=2, window=10, shuffle=True, validation=0.2, schedule=Linear(warmup=0.1))
    report = batch.run(sr.JoinedEvents(sr.Memory(labeled), schema=SCHEMA))
    assert model.rate == 1.0 and model.steps >= 15
    assert report.counts["learned"] == 2 * 32


def test_an_archive_first_and_then_the_stream(folder: Path, tmp_path: Path) -> None:
    shown = impressions(60, seed=3)
    labeled = [sr.Labeled(one, float("red" in str(one.features["title"]))) for one in shown]

    def make() -> sr.BertCTR:
        return sr.BertCTR(SCHEMA, folder, tune=LoRA(2), optimizer=QUICK)

    def archive(store: Any) -> sr.BatchTrainer:
        return sr.BatchTrainer(model=make(), epochs=2, window=7, shuffle=True, store=store, checkpoint_seconds=1e-9)

    class Breaks(sr.Memory):
        def read(self, limit: int) -> Any:
            if self.position()["index"] >= 28:
                raise sr.SourceError("the disk is gone")
            return super().read(limit)

    whole = archive(None)
    whole.run(sr.JoinedEvents(sr.Memory(labeled[:40]), schema=SCHEMA))
    whole.model.learn(encode(SCHEMA, shown[40:]).batch, np.array([one.label for one in labeled[40:]], dtype=np.float32))

    store = sr.Store(tmp_path)
    with pytest.raises(sr.SourceError, match="disk is gone"):
        archive(store).run(sr.JoinedEvents(Breaks(labeled[:40]), schema=SCHEMA))  # in the middle of an epoch
    archive(store).run(sr.JoinedEvents(sr.Memory(labeled[:40]), schema=SCHEMA))
    stream = sr.OnlineTrainer(model=make(), store=store)
    stream.run(sr.Memory(labeled[40:]))
    assert first_difference(copy_state(stream.model.state_dict()), copy_state(whole.model.state_dict())) is None


@pytest.mark.parametrize("tune", [Full(), LoRA(2)], ids=["full", "lora"])
def test_saved_models_are_plain_transformers_models(tune: Any, folder: Path) -> None:
    uri = f"memory://bertctr/{type(tune).__name__}"
    model = sr.BertCTR(SCHEMA, folder, tune=tune, optimizer=QUICK)
    model.learn(BATCH, LABELS)
    model.save_pretrained(uri)
    back = sr.BertCTR.from_pretrained(uri)
    np.testing.assert_allclose(back.predict(UNSEEN), model.predict(UNSEEN), atol=1e-6)
    assert {**back.config(), "checkpoint": ""} == {**model.config(), "checkpoint": ""}
    back.learn(BATCH, LABELS)  # goes on
    other = sr.BertCTR(SCHEMA, uri, tune=Top(1))
    np.testing.assert_allclose(other.predict(UNSEEN), model.predict(UNSEEN), atol=1e-6)
    with pytest.raises(sr.ConfigError, match="no BertCTR of streamrec"):
        sr.BertCTR.from_pretrained(folder)


def test_any_text_is_fine(folder: Path) -> None:
    model = sr.BertCTR(SCHEMA, folder, optimizer=QUICK)
    odd = [
        None,
        "",
        "  \t",
        "红" * 500_000,
        "a" * 1_000_000,
        "\x00\x01\x7f\xff",
        "😀🎉",
        "naïve 中文 mixed",
        "\ud800",
        7,
    ]
    shown = [sr.Impression(str(n), 0.0, "u", "p", {"query": text, "title": text}) for n, text in enumerate(odd)]
    batch = encode(SCHEMA, shown).batch
    scores = model.predict(batch)
    assert np.isfinite(scores).all()
    assert scores[0] == scores[1] == scores[2]
    model.learn(batch, np.ones(len(odd), dtype=np.float32))
    assert model.left_out == 0 and model.steps == 2


def test_negatives_and_class_weights(folder: Path) -> None:
    def make(**more: Any) -> sr.BertCTR:
        return sr.BertCTR(SCHEMA, folder, optimizer=AdamW(batch_size=1000), **more)

    sampled, singly = make(negatives=0.5), make(negatives=0.5)
    many = BATCH.take(np.arange(240) % len(BATCH))
    labels = np.tile(LABELS, 10)
    sampled.learn(many, labels)
    for row in range(len(many)):
        singly.learn(many.take([row]), labels[row : row + 1])
    assert first_difference(sampled.state_dict(), singly.state_dict()) is None
    held = sampled._pending.held
    clicks, others = ([one.weight for one in held if one.label == label] for label in (1.0, 0.0))
    assert len(clicks) == 80 and {*clicks} == {1.0}
    assert 50 < len(others) < 110 and {*others} == {2.0}
    # weighing clicks four times as much moves scores up
    even, heavy = (
        sr.BertCTR(SCHEMA, folder, optimizer=QUICK, class_weights=weights) for weights in ((1.0, 1.0), (1.0, 9.0))
    )
    for model in (even, heavy):
        model.learn(many, labels)
    assert heavy.predict(BATCH).mean() > even.predict(BATCH).mean() + 0.1


def test_augmentation_is_off_unless_asked_for_and_spares_special_tokens(folder: Path) -> None:
    def make(**more: Any) -> sr.BertCTR:
        return sr.BertCTR(SCHEMA, folder, pair=Pair(query=["query"], item=["title"], **more), optimizer=QUICK)

    model = make(drop=0.5, mask=0.4, span=2)
    rng = np.random.default_rng(0)
    rows = model.reader(BATCH)
    for row in rows:
        changed = augmented(row, model.reader, rng)
        special = [
            token for token in row.ids if token in model.reader.special and token != model.tokenizer.unk_token_id
        ]
        left = [token for token in changed.ids if token in special and token != model.reader.mask]
        assert [token for token in special if token != model.reader.mask] == left
        assert len(changed.ids) == len(changed.types) <= len(row.ids)
    assert any((augmented(row, model.reader, rng).ids == model.reader.mask).any() for row in rows)
    singly, off = make(drop=0.5, mask=0.4, span=2), make()
    assert not off.pair.augments
    np.testing.assert_array_equal(model.predict(BATCH), off.predict(BATCH))
    for one in (model, off):
        one.learn(BATCH, LABELS)
    for row in range(len(BATCH)):
        singly.learn(BATCH.take([row]), LABELS[row : row + 1])
    assert first_difference(model.state_dict(), singly.state_dict()) is None
    assert not np.array_equal(model.predict(BATCH), off.predict(BATCH))


def test_bf16_only_where_asked(folder: Path) -> None:
    exact, coarse = (
        sr.BertCTR(SCHEMA, folder, tune=Top(1), optimizer=AdamW(lr=1e-3, batch_size=8, bf16=bf16))
        for bf16 in (False, True)
    )
    for model in (exact, coarse):
        model.learn(BATCH, LABELS)
        assert {weight.dtype for weight in model.module.parameters()} == {torch.float32}
    assert not np.array_equal(exact.predict(BATCH), coarse.predict(BATCH))
    np.testing.assert_allclose(exact.predict(BATCH), coarse.predict(BATCH), atol=0.05)


def test_warm_up(folder: Path) -> None:
    slow, fast = (
        sr.BertCTR(SCHEMA, folder, optimizer=AdamW(lr=1e-3, batch_size=24, warmup=warmup)) for warmup in (1000, 0)
    )
    before = slow.predict(BATCH)
    for model in (slow, fast):
        model.learn(BATCH, LABELS)
    assert np.abs(slow.predict(BATCH) - before).max() < 0.05 * np.abs(fast.predict(BATCH) - before).max()


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ({"pair": Pair(item=["name"])}, "'name' is no Text field"),
        ({"tune": Top(3)}, "of a model of 2 layers"),
        ({"tune": LoRA(targets=["nothing"])}, "LoRA cannot go beside nothing"),
        ({"pair": Pair(item=["title"], max_tokens=65)}, "64 positions"),
        ({"labels": 3}, "labels must be 1"),
        ({"negatives": 0.0}, "negatives must be a share"),
        ({"class_weights": (0.0, 1.0)}, "class_weights must be two"),
    ):
        with pytest.raises(sr.ConfigError, match=said):
            sr.BertCTR(SCHEMA, folder, **wrong)  # type: ignore[arg-type]
    for settings in ({"lr": 0}, {"clip": -1.0}, {"batch_size": 0}, {"micro_batch": 0}, {"beta2": 1.0}):
        with pytest.raises(sr.ConfigError, match=f"AdamW: {next(iter(settings))}"):
            AdamW(**settings)
    with pytest.raises(sr.ConfigError, match="3 Text fields"):
        sr.BertCTR(sr.Schema(sr.Text("a"), sr.Text("b"), sr.Text("c")), folder)
    other = tiny_bert(tmp_path / "other", hidden=16, seed=1)
    state = sr.BertCTR(SCHEMA, other, tune=Top(1)).state_dict()
    with pytest.raises(sr.ConfigError, match="another model"):
        sr.BertCTR(SCHEMA, folder, tune=Top(1)).load_state_dict(state)
    wide = tiny_bert(tmp_path / "wide", hidden=32)
    with pytest.raises(sr.ConfigError, match="they differ in"):
        sr.BertCTR(SCHEMA, folder).load_state_dict(sr.BertCTR(SCHEMA, wide).published())
    with pytest.raises(sr.ConfigError, match="is empty"):
        sr.BertCTR.empty(sr.BertCTR(SCHEMA, folder).config()).predict(BATCH)
    shorter = (other / "config.json").read_text(encoding="utf-8").replace('layers": 2', 'layers": 3')
    (other / "config.json").write_text(shorter, encoding="utf-8")
    with pytest.raises(sr.ConfigError, match=r"lacks bert\.encoder\.layer\.2"):
        sr.BertCTR(SCHEMA, other)
    (other / "config.json").write_text(shorter.replace('layers": 3', 'layers": 1'), encoding="utf-8")
    with pytest.raises(sr.ConfigError, match=r"encoder\.layer\.1.*layers beyond its 1"):
        sr.BertCTR(SCHEMA, other)
    with pytest.raises(sr.ConfigError, match="another model's"):
        sr.BertCTR(SCHEMA, changed(wide, tmp_path / "shifted", pad_token_id=1))
