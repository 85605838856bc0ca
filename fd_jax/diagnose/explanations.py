"""What each figure shows, in plain sentences for a report."""

from typing import NamedTuple


class Explanation(NamedTuple):
    """Text beside a figure.

    Attributes:
      title: its heading.
      shows: what is drawn.
      reading: how to read it, and what the paper claims, where it has the figure.
      formula: the section with the formula.
    """

    title: str
    shows: str
    reading: str
    formula: str


EXPLANATIONS = {
    "distance": Explanation(
        "Attention distance",
        "How far each head looks, on average, from a patch to the patches it attends to, in pixels "
        "of the input. Each dot is a head; the line is the mean of a layer's heads.",
        "Dots that lie apart are heads that look at different ranges. The paper's claim: after "
        "distillation, the distances of the heads in deep layers spread out.",
        "docs/reference.md#attention-distance",
    ),
    "similarity": Explanation(
        "Similarity of the heads",
        "The cosine between the attention of two heads of the same layer, averaged over all pairs "
        "of heads, queries and images.",
        "1 means that all heads of a layer do the same; lower is more diverse. The paper's claim: "
        "after distillation, the cosine falls in deep layers.",
        "docs/reference.md#head-similarity",
    ),
    "maps": Explanation(
        "Average attention maps",
        "The attention of each layer, averaged over images and heads, without class token and "
        "registers. Rows are queries and columns are keys; patches go row by row from the top left "
        "of the picture. A Swin's map is that of one window.",
        "A diagonal means that patches attend to a fixed offset, wherever they are; a column means "
        "that all of them attend to the same place. The paper's claim: after distillation, there "
        "are more diagonals.",
        "docs/reference.md#attention-maps",
    ),
    "class_row": Explanation(
        "Attention of the class token",
        "How much the class token attends to each patch, averaged over images and heads, at the "
        "patches' places in the picture.",
        "Bright places contribute most to the class token.",
        "docs/reference.md#attention-maps",
    ),
    "class_column": Explanation(
        "Attention to the class token",
        "How much each patch attends to the class token, averaged over images and heads, at the "
        "patches' places in the picture.",
        "Bright patches read most from the class token.",
        "docs/reference.md#attention-maps",
    ),
    "shares": Explanation(
        "Diagonals and columns as numbers",
        "Two shares of the variance of each average map: the one that the means by offset explain, "
        "and the one that the means by key explain.",
        "A map of pure diagonals has an offset share of 1, a map of pure columns a key share of 1. "
        "More diagonals after distillation means a higher offset share.",
        "docs/reference.md#attention-maps",
    ),
    "entropy": Explanation(
        "Entropy of the attention",
        "The entropy of each head's attention in nats, averaged over queries and images. Each dot "
        "is a head; the line is the mean of a layer's heads.",
        "0 means that a query attends to one token. The most that is possible, the logarithm of "
        "the number of tokens, means that it attends to all of them equally.",
        "docs/reference.md#head-similarity",
    ),
    "divergence": Explanation(
        "Divergence of the heads",
        "The mean Kullback-Leibler divergence between the attention of two heads of a layer, in "
        "nats.",
        "0 means that the heads of a layer do the same; higher is more diverse.",
        "docs/reference.md#head-similarity",
    ),
    "landscape": Explanation(
        "Landscape of loss and accuracy",
        "Cross entropy and top-1 accuracy when the weights move along random directions whose "
        "filters are as long as the model's own. A curve is one direction. Weight decay is not "
        "part of the loss.",
        "The flatter the curves, the less a change of the weights hurts. The paper's claim: after "
        "distillation, the landscapes of the fine-tuned models are flatter.",
        "docs/reference.md#landscape",
    ),
    "rank": Explanation(
        "Effective rank",
        "The effective rank of the features after each block.",
        "A low rank means that the features vary in few directions.",
        "docs/reference.md#representations",
    ),
    "cka": Explanation(
        "Linear CKA between models",
        "How alike the features of two models are after the same block, up to rotation and scale.",
        "1 means that the features are the same up to rotation and scale, 0 that they are "
        "unrelated.",
        "docs/reference.md#representations",
    ),
    "cosine": Explanation(
        "Cosine between models",
        "The mean cosine between the features of two models after the same block, token by token.",
        "1 means that the features point in the same direction, without any rotation.",
        "docs/reference.md#representations",
    ),
    "pca": Explanation(
        "Principal components of one picture",
        "The first three principal components of the patch features of one picture, as red, green "
        "and blue.",
        "Patches of one colour have similar features. Colours are not comparable between models.",
        "docs/reference.md#representations",
    ),
    "rollout": Explanation(
        "Attention rollout of one picture",
        "The attention of all layers multiplied, with the residual connections taken into account.",
        "Bright patches contribute most to the output.",
        "docs/reference.md#representations",
    ),
    "heads": Explanation(
        "Heads of one picture",
        "The attention of each head of one layer to the patches of one picture.",
        "Heads that look alike do the same. Compare them with the similarity of the heads.",
        "docs/reference.md#attention-maps",
    ),
}
