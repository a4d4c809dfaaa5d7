"""Processes that train together stop together: a signal to one is everybody's after the same step."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from repvitok.runtime.callbacks import SaveLast, TrainingInterrupted
from repvitok.runtime.errors import UserError


class Ranks:
    """Stands in for the strategy of ranks that are asked one after the other: keeps the largest number so far."""

    root_device, is_global_zero = torch.device("cpu"), False

    def __init__(self):
        self.largest = 0

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "max"
        self.largest = max(self.largest, int(tensor))
        return torch.tensor(self.largest)

    def broadcast(self, value):
        return value


class Stub(Trainer):
    """As much of a trainer as `SaveLast` looks at."""

    global_step, default_root_dir, ckpt_path = 7, "run", "other/last.ckpt"
    fit_loop = SimpleNamespace(_data_fetcher=None, epoch_loop=SimpleNamespace(_should_check_val_fx=lambda _: False))

    def __init__(self, world_size, strategy):
        self._world_size, self._strategy, self.saved = world_size, strategy, []

    @property
    def world_size(self):
        return self._world_size

    @property
    def strategy(self):
        return self._strategy

    def save_checkpoint(self, path, *_, **__):
        self.saved.append(str(path))


@pytest.fixture
def started():
    """Callbacks whose training has begun, each with its trainer; signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def start(world_size, strategy=None):
        callback, trainer = SaveLast(every_seconds=None), Stub(world_size, strategy)
        callback.on_train_start(trainer, LightningModule())
        return callback, trainer

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def _end_step(callback, trainer):
    """Ends a step and, where training goes on, begins the next one; the last step's metrics are logged between."""
    callback.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    callback.on_train_batch_start(trainer, LightningModule(), None, 1)


def test_a_signal_to_one_rank_stops_both_after_the_step(started):
    ranks = Ranks()
    other, signalled = started(2, ranks), started(2, ranks)  # the last one to start has the process's handlers
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signalled[1].saved == [], "a step is not torn apart"
    for callback, trainer in (signalled, other):
        with pytest.raises(TrainingInterrupted, match="SIGUSR1 at step 7") as stopped:
            _end_step(callback, trainer)
        assert stopped.value.signal_number == signal.SIGUSR1
        assert trainer.saved == ["run/last.ckpt"]


def test_without_a_signal_nobody_stops(started):
    ranks = Ranks()
    for callback, trainer in (started(2, ranks), started(2, ranks)):
        _end_step(callback, trainer)
        assert trainer.saved == []


def test_a_rank_alone_asks_nobody(started):
    callback, trainer = started(1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="SIGTERM"):
        _end_step(callback, trainer)


def test_a_repeated_usr1_waits_and_a_second_term_does_not(started):
    started(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_number_of_ranks_is_refused_unless_the_data_allow_it(started):
    saved, content = started(2, Ranks())[0], {}
    saved.on_save_checkpoint(Stub(2, Ranks()), LightningModule(), content)
    callback, trainer = started(3, Ranks())
    trainer.state, trainer.datamodule = SimpleNamespace(fn="fit"), object()
    with pytest.raises(UserError, match="was trained by 2 processes, this run has 3"):
        callback.on_load_checkpoint(trainer, LightningModule(), content)
    trainer.datamodule = SimpleNamespace(any_number_of_ranks=True)
    callback.on_load_checkpoint(trainer, LightningModule(), content)
    callback.on_load_checkpoint(trainer, LightningModule(), {})  # of version 0.1, which kept no number


def test_ranks_together_do_not_leave_a_validation(started):
    ranks = Ranks()
    callback, trainer = started(2, ranks)
    os.kill(os.getpid(), signal.SIGUSR1)
    callback.on_validation_batch_end(trainer)
    alone, its_trainer = started(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(TrainingInterrupted):
        alone.on_validation_batch_end(its_trainer)
