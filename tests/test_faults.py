"""Faults at every seam end in the right text or in one clear error, and leave nothing behind."""

import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.testing import SEAMS, _find, fault

HOST_PART = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the layers of a static window are in a graph"
)
PROMPT = torch.randint(0, 96, (1, 21), generator=torch.Generator().manual_seed(4))
NEW = 24
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SETTINGS = {"max_length": 128, "rebalance_every": 2}


@pytest.fixture(scope="module", autouse=True)
def solver():
    pytest.importorskip("cvxpy")  # imported here, not while a test waits


@pytest.fixture(scope="module")
def expected(tiny_moe):
    return tiny_moe().generate(PROMPT, max_new_tokens=NEW, do_sample=False)


def attach(model, draft=None):
    budget = bytes_for_ratio(model, 0.3, SpacConfig(**SETTINGS), draft)
    return spac.attach(model, budget, draft=draft, **SETTINGS)


def text(model, draft="ngram", **options):
    options = {"draft": draft, "num_draft_tokens": 3, "max_new_tokens": NEW} | options
    return spac.generate(model, PROMPT, **options).cpu()


def spac_threads():
    return {t for t in threading.enumerate() if t.name.startswith("spac-")}


OTHERS: set[threading.Thread] = set()  # of models that other tests left attached


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(spac_threads())


def threads():
    return [t.name for t in spac_threads() - OTHERS]


def check_clean(model, expected):
    """The model is its plain self again, and no thread of spac is left."""
    assert attachment(model) is None and threads() == []
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())
    assert torch.equal(model.generate(PROMPT, max_new_tokens=NEW, do_sample=False), expected)


def test_every_seam_exists():
    for seam in SEAMS:
        owner, name = _find(seam)
        assert callable(getattr(owner, name)), seam
    with pytest.raises(ValueError, match="seam: expected one of measure, "), fault("engine"):
        pass


def test_a_fault_counts_and_goes_away():
    owner, name = _find("order")
    real = getattr(owner, name)
    scores = torch.rand(2, 3).numpy()
    with fault("order", fail=ValueError("broken"), after=1, times=1) as f:
        assert len(getattr(owner, name)(scores, scores >= 0)) == 6
        with pytest.raises(ValueError, match="broken"):
            getattr(owner, name)(scores, scores >= 0)
        assert len(getattr(owner, name)(scores, scores >= 0)) == 6
    assert (f.calls, f.hits) == (3, 1) and getattr(owner, name) is real


def shuffled(rows):
    return rows[torch.randperm(len(rows)).numpy()]


def answered_late(found):
    time.sleep(1.1)
    return found


HARMLESS = {
    "copies delayed": ("copy", {"delay": 0.02}),
    "copies reversed": ("order", {"change": lambda rows: rows[::-1]}),
    "copies shuffled": ("order", {"change": shuffled}),
    "worker slow": ("experts", {"delay": 0.001}),
    "draft wrong": ("draft", {"change": lambda r: (torch.randint_like(r[0], 96), r[1])}),
    "draft silent": ("draft", {"change": lambda r: (r[0][:0], None)}),
    "solver fails": ("solver", {"fail": ArithmeticError("singular")}),
    "solver late": ("solver", {"delay": 1.1}),
    "plan late": ("solver", {"change": answered_late}),
    "no plan": ("solver", {"change": lambda found: None}),
    "absurd plan": ("solver", {"change": lambda found: (found[0] * 0 + 99, "optimal")}),
    "greedy plan": ("solver", {"change": lambda found: (found[0] * 0, "optimal")}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_the_text_stays_right(tiny_moe, expected, case):
    seam, how = HARMLESS[case]
    model, draft = tiny_moe(), tiny_moe(num_hidden_layers=1)
    with fault(seam, **how) as f:
        attach(model, draft)
        assert torch.equal(text(model, draft), expected)
        if seam == "solver":
            deadline = time.monotonic() + 30
            balancer = attachment(model).engine.control.balancer.balancer
            while not balancer.failed + balancer.late and time.monotonic() < deadline:
                text(model, draft)
            assert balancer.failed + balancer.late and balancer.error
        assert f.hits or case == "copies delayed"
        spac.detach(model)
    check_clean(model, expected)


DEADLY = {
    "copy fails": ("copy", {"fail": OSError("bus error"), "after": 3}, "stopped: bus error"),
    "out of memory": ("experts", {"fail": OOM, "after": 50}, "CUDA out of memory"),
    "worker dies": ("experts", {"fail": RuntimeError("no thread"), "after": 7}, "no thread"),
    "Ctrl-C": ("layer", {"fail": KeyboardInterrupt("^C"), "after": 31}, "C"),
    "Ctrl-C in prefill": ("layer", {"fail": KeyboardInterrupt("^C"), "after": 1}, "C"),
    "draft dies": ("draft", {"fail": OOM, "after": 2}, "CUDA out of memory"),
}


@pytest.mark.parametrize("case", DEADLY)
def test_one_error_and_the_model_can_be_used_again(tiny_moe, expected, case):
    seam, how, message = DEADLY[case]
    model, draft = tiny_moe(), tiny_moe(num_hidden_layers=1)
    attach(model, draft)
    engine = weakref.ref(attachment(model).engine)
    error = RuntimeError if seam == "copy" else type(how["fail"])
    with fault(seam, **how):
        with pytest.raises(error, match=message):
            for _ in range(40):  # copies take their time
                text(model, draft)
    if seam != "copy":  # the fault is over: the same attachment goes on
        assert torch.equal(text(model, draft), expected)
    spac.detach(model)
    check_clean(model, expected)
    attach(model, draft)
    assert torch.equal(text(model, draft), expected)
    spac.detach(model)
    how["fail"].__traceback__ = None
    gc.collect()
    assert engine() is None  # nothing holds slots or store of the first attachment


AT_ATTACH = {
    "pinned memory refused": ("host memory", MemoryError("cannot page-lock"), 1),
    "slots do not fit": ("slot memory", OOM, 0),
    "first fill fails": ("copy", OOM, 3),
    "Ctrl-C while measuring": ("measure", KeyboardInterrupt(), 0),
}


@pytest.mark.parametrize("case", AT_ATTACH)
def test_a_failed_attach_leaves_the_model_as_it_was(tiny_moe, expected, monkeypatch, case):
    seam, error, after = AT_ATTACH[case]
    monkeypatch.setattr("spac.attachment._measured", lambda *a: spac.attachment.measure(*a, 0.01))
    model = tiny_moe()
    with fault(seam, fail=error, after=after) as f, pytest.raises(type(error)):
        attach(model)
    assert f.hits == 1
    check_clean(model, expected)
    attach(model)
    assert torch.equal(text(model), expected)
    spac.detach(model)
    check_clean(model, expected)


def test_attach_twice_leaves_the_first_in_force(tiny_moe, expected):
    model = tiny_moe()
    attach(model)
    state = attachment(model)
    with pytest.raises(ValueError, match="attached already; call spac.detach"):
        attach(model)
    assert attachment(model) is state and torch.equal(text(model), expected)
    spac.detach(model)
    with pytest.raises(ValueError, match="detach: this model is not attached"):
        spac.detach(model)
    check_clean(model, expected)


class Streamer:
    """Calls `what` with each piece of text."""

    def __init__(self, what):
        self.what = what

    def put(self, ids):
        self.what()

    def end(self):
        pass


def test_detach_during_generation_is_refused(tiny_moe, expected):
    model = tiny_moe()
    attach(model)
    with pytest.raises(RuntimeError, match="spac: detach: this model is generating"):
        text(model, streamer=Streamer(lambda: spac.detach(model)))
    assert torch.equal(text(model), expected)
    spac.detach(model)
    check_clean(model, expected)


def test_a_second_thread_is_refused_and_does_not_disturb(tiny_moe, expected):
    model = tiny_moe()
    attach(model)
    refused = []

    def second():
        for act in (text, spac.detach):
            try:
                act(model)
            except RuntimeError as error:
                refused.append(str(error))

    def once():
        if not refused:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert torch.equal(text(model, streamer=Streamer(once)), expected)
    assert [r.split(": this")[0] for r in refused] == ["spac: generate", "spac: detach"]
    spac.detach(model)
    check_clean(model, expected)


def test_two_models_in_two_threads(tiny_moe, expected):
    models = [tiny_moe(), tiny_moe(seed=1)]
    wanted = [expected, models[1].generate(PROMPT, max_new_tokens=NEW, do_sample=False)]
    for model in models:
        attach(model)
    found = [[], []]

    def work(i):
        found[i] += [text(models[i], None if turn else "ngram") for turn in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, model in enumerate(models):
        assert len(found[i]) == 3 and all(torch.equal(t, wanted[i]) for t in found[i])
        spac.detach(model)
    assert threads() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA context does not survive a fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_after_attach(tiny_moe, expected):
    """The child gets one clear error and can detach; the parent goes on."""
    model = tiny_moe()
    attach(model)
    assert torch.equal(text(model), expected)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)  # a hang ends the child
            try:
                text(model)
            except RuntimeError as error:
                assert "attached before a fork" in str(error)
                spac.detach(model)
                code = 0 if torch.equal(text(model), expected) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(text(model), expected)
    spac.detach(model)
    check_clean(model, expected)


def test_a_model_that_is_dropped_attached_leaves_no_thread(tiny_moe):
    model = tiny_moe()
    attach(model)
    text(model)
    assert threads()
    engine = weakref.ref(attachment(model).engine)
    del model
    deadline = time.monotonic() + 20
    while (threads() or engine() is not None) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not threads() and engine() is None  # slots and host store are free again


@HOST_PART
def test_a_static_window_that_was_interrupted(tiny_moe, expected):
    """The worker follows the device: what an interrupted window left does not disturb the next."""
    model = tiny_moe()
    settings = SETTINGS | {"static_windows": True}
    spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
    text(model)
    with fault("experts", fail=KeyboardInterrupt("^C"), after=17), pytest.raises(KeyboardInterrupt):
        text(model)
    assert torch.equal(text(model), expected)
    spac.detach(model)
    check_clean(model, expected)


@HOST_PART
@pytest.mark.parametrize("after", [0, 5])
def test_interrupted_while_it_waits_for_the_worker_beside_another_model(tiny_moe, expected, after):
    models = [tiny_moe(), tiny_moe()]
    settings = SETTINGS | {"static_windows": True}
    for model in models:
        spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
    for _ in range(2):
        with fault("handed", fail=KeyboardInterrupt("^C"), after=after) as f:
            with pytest.raises(KeyboardInterrupt):
                text(models[0])
        assert f.hits == 1
        assert all(torch.equal(text(model), expected) for model in models)
    for model in models:
        spac.detach(model)
    for model in models:
        check_clean(model, expected)
