"""Few numbers of data are known where tensors have none: labels are checked, and rows chosen by them."""

import torch

from align.planning.phantom import COPIED, Phantom
from align.planning.targets import Target


def test_copies_of_few_numbers_keep_them():
    with Phantom(Target()):
        label = torch.tensor([0.0, 1.0, 1.0]).to("meta")
        rows = label[torch.tensor([1, 0])]
        assert rows.is_meta and rows.tolist() == [1.0, 0.0]
        assert bool(((label == 0) | (label == 1)).all()) and not bool((label == 1).all())
        assert len(label[label == 1]) == 2
        assert (2 * label).tolist() != [0.0, 2.0, 2.0]  # what is computed is about a half
        assert torch.zeros(COPIED + 1).to("meta")[:2].tolist() != [0.0, 0.0]  # so are many
