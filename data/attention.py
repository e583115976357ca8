"""
Causal attention for training on a CPU: the same function as PyTorch's, with a faster backward pass.

    y = attention(q, k, v)              # (B, n_head, T, head_dim); see model.causal_attention, which calls it

PyTorch's kernel (FlashAttention-2, arXiv 2307.08691) has a fast forward pass, but in bfloat16 its backward pass takes
five times as long. The formulas of the backward pass are five matrix products and some operations on the attention
weights, which torch.compile fuses into one loop.
"""
import torch

ROWS = 128      # queries at a time; keys after them need not be multiplied, as none of them is seen
LONGEST = 1024  # tokens; more would take long to compile, since every 128 are compiled separately


def is_faster(v):
    """Whether this attention should be used for values v (B, n_kv_head, T, head_dim): compiled bfloat16 on a CPU."""
    return (torch.compiler.is_compiling() and v.device.type == 'cpu' and v.dtype == torch.bfloat16
            and ROWS // 2 <= v.size(2) <= LONGEST)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        group = q.size(1) // k.size(1)                          # query heads that share a key/value head
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), 0.0, True)
        ctx.save_for_backward(q, k, v, y, logsumexp)            # logsumexp (B, n_head, T): of every query's scores
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, logsumexp = ctx.saved_tensors
        B, H, T, D = q.shape
        KV, scale = k.size(1), D ** -0.5
        # the backward pass of a softmax subtracts the mean of its weights' gradients, which is y . dy for each query
        mean = (dy.float() * y.float()).sum(dim=-1)                              # (B, n_head, T)
        dq, dk, dv = [], 0, 0
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            n = end - start

            def rows(t):
                """These queries' part of t (B, n_head, T, ...), all that share a key/value head below each other."""
                return t[:, :, start:end].reshape(B * KV, H // KV * n, -1)

            def seen(t):
                """The part of t (B, n_kv_head, T, head_dim) that these queries see."""
                return t[:, :, :end].reshape(B * KV, end, D)
            query = start + torch.arange(H // KV * n, dtype=torch.int32) % n
            visible = torch.arange(end, dtype=torch.int32) <= query[:, None]     # the rule that the kernel knows
            scores = (rows(q) @ seen(k).mT).float() * scale                      # (B * n_kv_head, rows, end)
            dweights = (rows(dy) @ seen(v).mT).float()
            weights = torch.where(visible, (scores - rows(logsumexp)).exp(), 0.0)
            dscores = (weights * (dweights - rows(mean)) * scale).to(q.dtype)
            dq.append((dscores @ seen(k)).view(B, H, n, D))
            unseen = (0, 0, 0, T - end)
            dk = dk + torch.nn.functional.pad(dscores.mT @ rows(q), unseen)
            dv = dv + torch.nn.functional.pad(weights.to(v.dtype).mT @ rows(dy), unseen)
        return torch.cat(dq, dim=2), dk.view(k.shape), dv.view(v.shape)


attention = Attention.apply
