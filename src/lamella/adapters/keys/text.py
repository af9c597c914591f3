"""LoraRetriever: by the texts that a LoRA was trained on."""

from torch import Tensor

from lamella.adapters.keys.centroids import nearest
from lamella.adapters.keys.registry import Score, retrieval_key


@retrieval_key("text", reads="texts")
def text(texts: Tensor) -> Score:
    """The cosine of a prompt's text embedding with the mean of those of a LoRA's training rows, shifted as `centroids`.

    A text embedding is here the mean of the base's own token embeddings over the prompt: its words, in no order. So no
    pass of the base and no second model is needed, and every group of a sequence has the same shortlist.

    Source: LoraRetriever (arXiv 2402.09997), as RAMoLE (arXiv 2406.16989) has it too; theirs is a trained encoder of
    sentences, and each LoRA has the mean of a few of its training rows.

    Args:
        texts: means over groups of training rows, of n LoRAs, ``(n, c, features)``; zeros where a LoRA has none.
    """
    return nearest(texts)
