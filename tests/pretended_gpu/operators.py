"""What torch's operators ask of a GPU, by their names: views, reads by the host, and kernels."""

from __future__ import annotations

NO_KERNEL = frozenset(
    [
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "narrow",
        "detach",
        "alias",
        "as_strided",
        "unsqueeze",
        "squeeze",
        "diagonal",
        "unflatten",
        "view_as",
        "expand_as",
        "movedim",
        "swapaxes",
        "reshape",
        "_reshape_alias",
        "real",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "set_",
        "resize_",
        "detach_",
        "sym_size",
        "sym_stride",
        "size",
        "stride",
        "is_same_size",
        "is_pinned",
        "_pin_memory",
        "device",
        "_has_compatible_shallow_copy_type",
        "unsafe_split",
        "_conj",
        "_unsafe_chunk_cat_view",
    ]
)
"""Operators that only make another view, or only allocate."""

READS = frozenset(["_local_scalar_dense", "item", "is_nonzero", "equal"])
"""Operators whose result is a number of the host: the host waits for everything queued before."""

DATA_DEPENDENT = frozenset(
    [
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "unique_consecutive",
        "bincount",
        "histc",
        "repeat_interleave",
    ]
)
"""Operators whose output shape depends on values, which the host has to wait for."""

INDEXING = frozenset(["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"])

SEVERAL_KERNELS = {
    "index_put": 5, "index_put_": 5, "_index_put_impl_": 5, "embedding_dense_backward": 6,
    "sort": 4, "topk": 3, "cumsum": 2,
    "native_layer_norm_backward": 2, "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}  # fmt: skip
"""Kernels of the operators that launch more than one; read off torch's CUDA sources, so good for comparisons only."""

PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm"])
