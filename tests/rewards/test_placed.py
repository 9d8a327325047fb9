import pytest
import torch
from torch import nn

from rewards import Placed, Reward, Weighted


class Somewhere(Reward):
    """Looks at media on its own device only."""

    needs_prompt = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.freeze()

    def measure(self, media, prompts):
        assert media.device == self.weight.device
        return self.weight * media.mean((1, 2, 3))


def test_it_stays_when_what_it_is_part_of_moves() -> None:
    reward = Placed(Somewhere(), "cpu")
    nn.ModuleList([reward]).to("meta")
    nn.ModuleList([reward]).half()
    assert reward.reward.weight.device.type == "cpu" and reward.reward.weight.dtype == torch.float32
    media = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = reward(media)
    assert torch.equal(scores, Somewhere()(media))
    (slope,) = torch.autograd.grad(scores.sum(), media)
    torch.testing.assert_close(slope, torch.full_like(slope, 2 / 48))


def test_media_and_scores_cross_over() -> None:
    reward = Placed(Somewhere(), "meta")  # a device without numbers: only the way is tested
    sent = []
    reward.reward.score = lambda media, prompts: (
        sent.append(media.device.type) or Somewhere().score(torch.ones(2, 3, 4, 4))
    )
    assert reward(torch.rand(2, 3, 4, 4)).device.type == "cpu"
    assert sent == ["meta"]


def test_it_does_not_make_its_neighbours_move_at_each_call() -> None:
    away, neighbour = Placed(Somewhere(), "meta"), Somewhere()
    away.score = lambda media, prompts: neighbour.score(media)
    moves = []
    neighbour._apply = lambda fn, recurse=True: moves.append(fn)  # where text features are forgotten
    Weighted([away, neighbour])(torch.rand(2, 3, 4, 4))
    assert not moves


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cannot use the device 'cuda:77'"):
        Placed(Somewhere(), "cuda:77")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_scores_what_the_cpu_made() -> None:
    media = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = Placed(Somewhere(), "cuda")(media)
    assert scores.device.type == "cpu"
    torch.autograd.grad(scores.sum(), media)
