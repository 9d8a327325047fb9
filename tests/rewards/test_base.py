"""The contract that `Reward` itself keeps, whatever a subclass measures."""

import pytest
import torch
from torch import nn

import rewards
from rewards import Prompt, Reward, Scores, as_prompts


class Mean(Reward):
    """Mean pixel through a network with dropout."""

    needs_prompt = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
        nn.init.ones_(self.net[1].weight)
        self.freeze()

    def measure(self, media, prompts):
        return self.net(media.float().flatten(1).mean(dim=1, keepdim=True))[:, 0]


class Blind(Mean):
    """The same without a gradient."""

    differentiable = False


class Length(Mean):
    """Reads only the prompt."""

    needs_prompt = True

    def measure(self, media, prompts):
        return torch.tensor([float(len(p.text)) for p in prompts])


class Unjudged(Mean):
    """Cannot judge the second sample."""

    def measure(self, media, prompts):
        total = super().measure(media, prompts)
        total[1] = torch.nan
        return Scores(total, {"clause": total})


class Returns(Mean):
    """Returns what it was given."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def measure(self, media, prompts):
        return self.value


class Modal(Mean):
    def __init__(self, modality) -> None:
        super().__init__()
        self.modality = modality

    def measure(self, media, prompts):
        return media.double().flatten(1).mean(dim=1)


class Remembers(Mean):
    """Multiplies by what it computed the first time, as a reward that remembers prompts or positions does."""

    def measure(self, media, prompts):
        if not hasattr(self, "known"):
            self.known = 2 * self.net[1].weight.sum()
        return self.known * media.float().flatten(1).mean(dim=1)


IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 5).view(3, 3, 4, 5)


def test_scores_are_one_float32_a_sample() -> None:
    scores = Mean().score(IMAGES)
    assert scores.total.shape == (3,)
    assert scores.total.dtype == torch.float32
    torch.testing.assert_close(scores.total, IMAGES.flatten(1).mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_for_any_input_type(dtype: torch.dtype) -> None:
    assert Mean()(IMAGES.to(dtype)).dtype == torch.float32
    assert Modal("image")(IMAGES.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("media", "error", "message"),
    [
        (IMAGES * 2 - 1, ValueError, r"pass \(media \+ 1\) / 2"),
        (IMAGES * 255, ValueError, r"spanning \[0, 255\]"),
        ((IMAGES * 255).byte(), TypeError, "divide by 255"),
        (IMAGES[0], ValueError, r"got float32 \(3, 4, 5\)"),
        (IMAGES.permute(0, 2, 3, 1), ValueError, r"permute\(0,3,1,2\)"),
        (IMAGES[:, :1], ValueError, r"\(B,3,H,W\)"),
        (IMAGES[:0], ValueError, "must not be empty"),
        (IMAGES.numpy(), TypeError, "must be a tensor"),
    ],
)
def test_wrong_media_raise_and_say_what_to_do(media, error, message) -> None:
    with pytest.raises(error, match=message):
        Mean()(media)


def test_round_off_of_a_decoder_is_accepted() -> None:
    Mean()(IMAGES * 1.0005)
    with pytest.raises(ValueError, match="spanning"):
        Mean()(IMAGES * 1.01)


@pytest.mark.parametrize(
    ("modality", "right", "wrong"),
    [
        ("video", torch.rand(2, 4, 3, 5, 5), torch.rand(2, 3, 4, 5, 5)),
        ("audio", torch.rand(2, 1, 9) * 2 - 1, torch.rand(2, 1, 9) * 3),
        ("tokens", torch.arange(6).view(2, 3), torch.rand(2, 3)),
    ],
)
def test_each_modality_has_its_layout(modality, right, wrong) -> None:
    assert Modal(modality)(right).shape == (2,)
    with pytest.raises((TypeError, ValueError), match="media must be"):
        Modal(modality)(wrong)


def test_one_prompt_a_sample() -> None:
    assert Length()(IMAGES, ["a", Prompt("bb"), "ccc"]).tolist() == [1, 2, 3]
    for wrong in ([], ["a"], ["a"] * 4, "a"):
        with pytest.raises(ValueError, match="one prompt a sample"):
            Length()(IMAGES, wrong)
    with pytest.raises(TypeError, match="str or Prompt; got int"):
        Length()(IMAGES, ["a", "b", 3])


def test_a_reward_without_need_still_refuses_mismatched_prompts() -> None:
    torch.testing.assert_close(Mean()(IMAGES), Mean()(IMAGES, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="got 2 prompts for 3 samples"):
        Mean()(IMAGES, ["a", "b"])


def test_as_prompts_keeps_prompts_and_wraps_strings() -> None:
    prompt = Prompt("a", negative="b", meta={"count": 2})
    assert as_prompts(["x", prompt]) == [Prompt("x"), prompt]
    assert as_prompts("x") == [Prompt("x")]
    assert str(prompt) == "a"
    assert hash(prompt) == hash(Prompt("a", negative="b"))


def test_what_was_remembered_without_a_gradient_can_enter_a_graph_later() -> None:
    """Inference mode would forbid it, for the scores as for what a reward keeps."""
    reward, x = Remembers(), IMAGES.clone().requires_grad_()
    with torch.no_grad():
        baseline = reward(IMAGES)
    (reward(x) * baseline).sum().backward()
    torch.testing.assert_close(x.grad.flatten(1)[:, 0], baseline * 2 / 60)


def test_gradient_flows_only_where_asked() -> None:
    x = IMAGES.clone().requires_grad_()
    Mean()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 60))
    with torch.no_grad():
        assert not Mean()(x).requires_grad
    assert not Mean()(IMAGES).requires_grad


def test_gradient_of_a_reward_without_one_is_a_named_error() -> None:
    x = IMAGES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Blind is not differentiable"):
        Blind()(x)
    with torch.no_grad():
        torch.testing.assert_close(Blind()(x), Mean()(IMAGES))


def test_dropout_stays_off_whatever_a_parent_does() -> None:
    parent = nn.ModuleList([Mean()]).train()
    torch.testing.assert_close(parent[0](IMAGES), IMAGES.flatten(1).mean(dim=1))
    assert not any(m.training for m in parent[0].modules())
    assert not any(p.requires_grad for p in parent.parameters())


def test_autocast_of_the_caller_does_not_change_a_score() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Mean()(IMAGES), Mean()(IMAGES.clone()))
        inside = Mean()(IMAGES)
    assert torch.equal(inside, Mean()(IMAGES))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_samples_that_are_not_finite_get_nan_and_spoil_no_other(broken: float) -> None:
    media = IMAGES.clone()
    media[1, 2, 0, 0] = broken
    scores, whole = Mean().score(media), Mean().score(IMAGES)
    assert scores.total.isnan().tolist() == [row == 1 for row in range(len(media))]
    keep = [row for row in range(len(media)) if row != 1]
    assert torch.equal(scores.total[keep], whole.total[keep])
    assert Mean()(torch.full_like(media, broken)).isnan().all()
    with pytest.raises(ValueError, match="spanning"):
        Mean()(torch.where(media.isfinite(), media * 3, media))
    leaf = media.clone().requires_grad_()
    Mean()(leaf)[keep].sum().backward()
    assert bool((leaf.grad[keep] != 0).all())


def test_a_reward_remembers_how_it_was_made() -> None:
    assert rewards.JPEGSize("incompressible").arguments == {"aim": "incompressible"}
    assert rewards.Brightness().arguments == {}


def test_nan_is_kept_in_total_and_parts() -> None:
    scores = Unjudged().score(IMAGES)
    assert scores.total.isnan().tolist() == [False, True, False]
    assert scores.parts["clause"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "value", [torch.zeros(()), torch.zeros(3, 1), torch.zeros(1), Scores(torch.zeros(3), {"p": torch.zeros(1)})]
)
def test_a_subclass_that_reduces_or_broadcasts_is_caught(value) -> None:
    with pytest.raises(ValueError, match=r"must return \(3,\) scores"):
        Returns(value)(IMAGES)


@pytest.mark.parametrize("name", ["weight", "buffer"])
def test_it_follows_the_device_of_its_input(name: str) -> None:
    class Held(Reward):
        """Holds one tensor."""

        needs_prompt = False

        def __init__(self) -> None:
            super().__init__()
            tensor = torch.ones(1, device="meta")
            if name == "weight":
                self.register_parameter("held", nn.Parameter(tensor))
            else:
                self.register_buffer("held", tensor)

        def to(self, device):
            self.moved_to = device
            return self

        def measure(self, media, prompts):
            return media.flatten(1).mean(dim=1)

    reward = Held()
    reward(IMAGES)
    assert reward.moved_to == IMAGES.device
