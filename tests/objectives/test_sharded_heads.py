"""Heads whose weights lie on several ranks: gathered where they are read, with the gradients of one process."""

import itertools
import os
import sys
import types

import pytest
import torch
from head_problems import CLOSE, build, gradients, plain, problem
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from smolpost.objectives.head import Head, head_of
from smolpost.objectives.logprobs import token_scores


class Status:
    """DeepSpeed's ZeroParamStatus, as far as it is read."""

    def __init__(self, name):
        self.name = name


@pytest.fixture
def partitioned(monkeypatch):
    """Stand-in for DeepSpeed that counts how often parameters are gathered; real ranks: tests of training."""
    gathers = []

    class GatheredParameters:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            gathers.append(len(self.parameters))
            for parameter in self.parameters:
                parameter.data, parameter.ds_status = parameter.whole, Status("AVAILABLE")

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data, parameter.ds_status = torch.empty(0), Status("NOT_AVAILABLE")

    def partition(parameter):
        parameter.ds_id, parameter.whole = 1, parameter.data
        parameter.data, parameter.ds_status = torch.empty(0), Status("NOT_AVAILABLE")

    zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return types.SimpleNamespace(partition=partition, gathers=gathers)


@pytest.mark.parametrize("weighted, gathers", [(False, [2, 2]), (True, [2])])
def test_partitioned_heads_are_gathered_where_they_are_read(weighted, gathers, partitioned):
    hidden, targets, weights, head = problem(20, 30, 5, bias=True)
    wanted = gradients((weights * plain(hidden, targets, head)[0]).sum(), hidden, head)
    head = Head(nn.Parameter(head.weight.detach()), nn.Parameter(head.bias.detach()), None, 1.0)
    for parameter in head[:2]:
        partitioned.partition(parameter)
    scores = token_scores(hidden, targets, head, weights=weights if weighted else None)
    assert head.weight.numel() == 0
    total = scores.total if weighted else (weights * scores.logps).sum()
    made = torch.autograd.grad(total, [hidden, head.weight, head.bias])
    assert partitioned.gathers == gathers
    assert_close(made, wanted, **CLOSE)


def test_a_parameter_already_gathered_is_left_to_who_gathered_it(partitioned):
    hidden, targets, _, head = problem(20, 30, 5)
    head.weight.ds_id, head.weight.ds_status = 1, Status("AVAILABLE")
    token_scores(hidden, targets, head).logps.sum().backward()
    assert partitioned.gathers == [] and head.weight.numel() == 150


def fsdp_rank(rank, store):
    """Each rank scores tokens of its own, rank 0 none; the averaged gradient is that of all tokens on one process."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids, weights = torch.arange(3, 15)[None], torch.linspace(-1, 1, 12)

    def loss(model, part, weighted):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0][part]
        scores = token_scores(hidden, ids[0][part], head_of(model), weights=weights[part] if weighted else None)
        return scores.total if weighted else (weights[part] * scores.logps).sum()

    for unit, weighted in itertools.product(("root", "own"), (False, True)):
        model, reference = build("ours untied"), build("ours untied")
        model.forward = types.MethodType(loss, model)
        if unit == "own":  # then the head is still sharded when it is read
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model([slice(0, 0), slice(0, 12)][rank], weighted).backward()
        (loss(reference, slice(0, 12), weighted) / 2).backward()  # FSDP's is the mean over ranks
        for sharded, whole in zip(model.parameters(), reference.parameters(), strict=True):
            assert_close(sharded.grad.full_tensor(), whole.grad, atol=1e-5, rtol=1e-4)
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads free their last tensors under the GIL: a thread that finds Python going down aborts


def test_fsdp_on_two_ranks_averages_the_heads_gradient(tmp_path):
    torch.multiprocessing.spawn(fsdp_rank, (tmp_path / "store",), nprocs=2)
