"""Times the attention of this machine's own libraries on the shapes of bench/cuda/kernel_bench.cu, and writes JSON that it
reads: the least time of each (kind, type, batch, context) is the peer of our kernels.

  attention_peers.py --out peers.json [--only torch|cudnn|fa3]

torch: scaled_dot_product_attention with its flash and cuDNN backends, BF16, replayed from CUDA graphs.
cudnn: cuDNN's FP8 (E4M3) attention through its Python frontend, if it can be imported, likewise. fa3: FlashAttention-3
as packed by flash-attn3-jax, if it can be imported, BF16 and FP8 (E4M3); calls follow each other in one jitted function,
so that times of short kernels contain some launch overhead and only large shapes are measured. Decode: 8 KV heads x 128,
8 query heads each, one row a sequence. Each call has another cache, more than the L2 together.
"""
import argparse
import json
import time

DECODE = [(1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 8192), (8, 32768), (32, 8192), (32, 32768), (64, 8192), (64, 32768)]
PREFILL = [(2048, 0), (2048, 30720), (256, 30720)]  # rows, prefix
KV_HEADS, GROUP, DIM = 8, 8, 128


def copies_of(batch, context, element):
    size = 2 * batch * context * KV_HEADS * DIM * element
    return max(2, min(64, (512 << 20) // size + 1))


def graph_us(calls):
    """Median microseconds of a call, replayed from one CUDA graph of all of them."""
    import torch
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for i in range(9):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1e3 / len(calls)


def torch_peers(results):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attempt(kind, name, batch, context, calls):
        try:
            us = graph_us(calls)
        except Exception as error:  # a backend that does not take the shape is no peer
            print(f"{kind} {name} {batch}x{context}: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize()
            return
        results.append({"kind": kind, "type": "bf16", "peer": name, "batch": batch, "context": context, "us": us})

    backends = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
    for batch, context in DECODE:
        n = copies_of(batch, context, 2)
        # Two orders of the cache: [batch][head][token] and [batch][token][head].
        for order in ("bhsd", "bshd"):
            caches = []
            for _ in range(n):
                shape = (batch, KV_HEADS, context, DIM) if order == "bhsd" else (batch, context, KV_HEADS, DIM)
                k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
                caches.append((k, v) if order == "bhsd" else (k.transpose(1, 2), v.transpose(1, 2)))
            rows = torch.randn(batch, KV_HEADS, GROUP, DIM, device="cuda", dtype=torch.bfloat16)
            heads = rows.reshape(batch, KV_HEADS * GROUP, 1, DIM)
            for name, backend in backends.items():
                def call(q, k, v, gqa, backend=backend):
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
                attempt("decode", f"{name}, {order}, group as rows", batch, context,
                        [lambda k=k, v=v: call(rows, k, v, False) for k, v in caches])
                attempt("decode", f"{name}, {order}", batch, context,
                        [lambda k=k, v=v: call(heads, k, v, True) for k, v in caches])
            del caches
            torch.cuda.empty_cache()
    from torch.nn.attention.bias import causal_lower_right
    for rows, prefix in PREFILL:
        q = torch.randn(1, KV_HEADS * GROUP, rows, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, KV_HEADS, prefix + rows, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        wide = [x.repeat_interleave(GROUP, 1) for x in (k, v)]
        for name, backend in backends.items():
            def call(k, v, gqa, bias, backend=backend):
                with sdpa_kernel(backend):
                    if prefix == 0:
                        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
            bias = causal_lower_right(rows, prefix + rows) if prefix else None
            attempt("prefill", name, rows, prefix, [lambda: call(k, v, True, bias)] * 3)
            attempt("prefill", f"{name}, heads repeated", rows, prefix, [lambda: call(*wide, False, bias)] * 3)
            if prefix:  # without a mask: a little more work than asked for
                attempt("prefill", f"{name}, not causal", rows, prefix, [lambda: call(k, v, True, None)] * 3)


def cudnn_peers(results):
    import cudnn
    import torch
    handle = cudnn.create_handle()

    def build(batch, q_heads, rows, context, order, causal):
        def strides(heads, tokens):
            if order == "bhsd":
                return (heads * tokens * DIM, tokens * DIM, DIM, 1)
            return (tokens * heads * DIM, DIM, heads * DIM, 1)
        graph = cudnn.pygraph(io_data_type=cudnn.data_type.FP8_E4M3, intermediate_data_type=cudnn.data_type.FLOAT,
                              compute_data_type=cudnn.data_type.FLOAT, handle=handle)
        def tensor(heads, tokens):
            return graph.tensor(dim=(batch, heads, tokens, DIM), stride=strides(heads, tokens),
                                data_type=cudnn.data_type.FP8_E4M3)
        q, k, v = tensor(q_heads, rows), tensor(KV_HEADS, context), tensor(KV_HEADS, context)
        scales = [graph.tensor(dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=cudnn.data_type.FLOAT) for _ in range(6)]
        mask = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "right_bound": 0} if causal else {}
        out, _, amax_s, amax_o = graph.sdpa_fp8(
            q=q, k=k, v=v, descale_q=scales[0], descale_k=scales[1], descale_v=scales[2], descale_s=scales[3],
            scale_s=scales[4], scale_o=scales[5], attn_scale=DIM ** -0.5, generate_stats=False, **mask)
        out.set_output(True).set_dim((batch, q_heads, rows, DIM)).set_stride(strides(q_heads, rows))
        out.set_data_type(cudnn.data_type.FP8_E4M3)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(cudnn.data_type.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        one = torch.ones(1, 1, 1, 1, device="cuda")
        workspace = torch.empty(max(1, graph.get_workspace_size()), device="cuda", dtype=torch.uint8)
        amaxes = torch.zeros(2, 1, 1, 1, 1, device="cuda")
        def random(heads, tokens):
            return torch.randn(batch * heads * tokens * DIM, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
        rows_q, rows_out = random(q_heads, rows), random(q_heads, rows)
        def call(cache):
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute({q: rows_q, k: cache[0], v: cache[1], out: rows_out, amax_s: amaxes[0], amax_o: amaxes[1],
                           **{scale: one for scale in scales}}, workspace, handle=handle)
        return call, lambda: (random(KV_HEADS, context), random(KV_HEADS, context))

    def attempt(kind, name, batch, context, q_heads, rows, tokens, order, causal, copies):
        try:
            call, cache = build(1 if kind == "prefill" else batch, q_heads, rows, tokens, order, causal)
            caches = [cache() for _ in range(copies)]
            us = graph_us([lambda c=c: call(c) for c in caches])
        except Exception as error:
            print(f"{kind} {name} {batch}x{context}: {str(error).splitlines()[0][:160]}")
            return
        results.append({"kind": kind, "type": "fp8", "peer": name, "batch": batch, "context": context, "us": us})

    for batch, context in DECODE:
        for order in ("bhsd", "bshd"):
            copies = copies_of(batch, context, 1)
            attempt("decode", f"cuDNN FP8, {order}", batch, context, KV_HEADS * GROUP, 1, context, order, False, copies)
            attempt("decode", f"cuDNN FP8, {order}, group as rows", batch, context, KV_HEADS, GROUP, context, order, False,
                    copies)
    for rows, prefix in PREFILL:
        for causal in (True, False):
            if not causal and prefix == 0:
                continue
            attempt("prefill", f"cuDNN FP8{'' if causal else ', not causal'}", rows, prefix, KV_HEADS * GROUP, rows,
                    prefix + rows, "bshd", causal, 2)


def fa3_peers(results):
    import jax
    import jax.numpy as jnp
    import flash_attn3_jax  # registers the target
    assert flash_attn3_jax

    def attention(q, k, v, causal, splits, pack):
        batch, rows, heads, dim = q.shape
        out = jnp.bfloat16
        none_i = jnp.zeros((0,), jnp.int32)
        none_f = jnp.zeros((0,), jnp.float32)
        none_q = jnp.zeros((0,), q.dtype)
        accumulators = [(splits, batch, heads, rows, dim), (splits, batch, heads, rows)] if splits > 1 else [(1,) * 4, (1,) * 3]
        call = jax.ffi.ffi_call(
            "flash_mha_fwd",
            [jax.ShapeDtypeStruct(q.shape, out), jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32)]
            + [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in accumulators],
            input_layouts=[None] * 21, output_layouts=[None] * 4)
        return call(q, k, v, none_q, none_q, none_q, *[none_i] * 8, none_q, none_q, none_i, *[none_f] * 3, none_i,
                    max_seqlen_q=rows, max_seqlen_q_has_value=True, max_seqlen_k=k.shape[1],
                    max_seqlen_k_has_value=True, softmax_scale_val=float(dim) ** -0.5, softmax_scale_has_value=True,
                    pack_gqa_val=pack, pack_gqa_has_value=pack, is_causal=causal, window_size_left=-1,
                    window_size_right=0 if causal else -1, attention_chunk=0, softcap=0.0, is_rotary_interleaved=False,
                    num_splits=splits, sm_margin=0)[0]

    def measure(kind, kind_type, name, batch, context, q, caches, causal, splits, pack):
        repeats = 4
        def many(qs, caches):
            return [attention(qs[r], k, v, causal, splits, pack).ravel()[0] for r in range(repeats) for k, v in caches]
        try:
            qs = [q * jnp.asarray(1 + r / 8, q.dtype) for r in range(repeats)]
            run = jax.jit(many)
            jax.block_until_ready(run(qs, caches))
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                jax.block_until_ready(run(qs, caches))
                times.append(time.perf_counter() - begin)
            us = sorted(times)[2] * 1e6 / (repeats * len(caches))
        except Exception as error:
            print(f"{kind} {name} {batch}x{context}: {str(error).splitlines()[0][:160]}")
            return
        results.append({"kind": kind, "type": kind_type, "peer": name, "batch": batch, "context": context, "us": us})

    for batch, context in DECODE:
        if batch * context < 8 * 32768:
            continue
        for kind_type, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
            key = jax.random.key(batch)
            caches = []
            for i in range(2):
                shape = (batch, context, KV_HEADS, DIM)
                caches.append(tuple(jax.random.normal(jax.random.fold_in(key, 2 * i + j), shape, jnp.bfloat16).astype(dtype)
                                    for j in range(2)))
            q = jax.random.normal(key, (batch, GROUP, KV_HEADS, DIM), jnp.bfloat16).astype(dtype)
            measure("decode", kind_type, "FlashAttention-3, group as rows", batch, context, q, caches, False, 1, False)
            if dtype == jnp.bfloat16:
                heads = q.reshape(batch, 1, GROUP * KV_HEADS, DIM)
                for splits in (1, 2, 4):
                    measure("decode", kind_type, f"FlashAttention-3, {splits} splits", batch, context, heads, caches, False,
                            splits, True)
            del caches
    for rows, prefix in PREFILL:
        key = jax.random.key(rows)
        for kind_type, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
            q = jax.random.normal(key, (1, rows, GROUP * KV_HEADS, DIM), jnp.bfloat16).astype(dtype)
            k, v = (jax.random.normal(jax.random.fold_in(key, j), (1, prefix + rows, KV_HEADS, DIM), jnp.bfloat16).astype(dtype)
                    for j in range(2))
            measure("prefill", kind_type, "FlashAttention-3", rows, prefix, q, [(k, v)], True, 1, False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", choices=("torch", "cudnn", "fa3"))
    args = parser.parse_args()
    results = []
    for name, run in (("torch", torch_peers), ("cudnn", cudnn_peers), ("fa3", fa3_peers)):
        if args.only in (None, name):
            try:
                run(results)
            except ImportError as error:
                print(f"{name}: {error}")
    with open(args.out, "w") as file:
        json.dump({"results": results}, file, indent=1)
    best = {}
    for r in results:
        key = (r["kind"], r["type"], r["batch"], r["context"])
        if key not in best or r["us"] < best[key]["us"]:
            best[key] = r
    for r in best.values():
        print(f"{r['kind']:8} {r['type']:5} {r['batch']:5}x{r['context']:<6} {r['us']:10.2f} us  {r['peer']}")


if __name__ == "__main__":
    main()
