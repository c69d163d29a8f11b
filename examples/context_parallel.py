"""One document over several processes, each computing a part of it: exactly what one process computes.

    torchrun --nproc_per_node 4 examples/context_parallel.py --length 262144 --check

runs on GPUs by NCCL, and where there are none on the CPU by gloo.
"""

import argparse
import os

import torch
import torch.distributed as dist

import bigbird_plus


def main(argv=None):
    args = parse_args(argv)
    use_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same weights and the same document everywhere
    config = bigbird_plus.BigBirdConfig(
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_attention_heads=max(1, args.hidden_size // 32),
        num_hidden_layers=args.layers,
        tiled_positions=True,
    )
    model = bigbird_plus.BigBirdModel(config).to(device).eval()
    input_ids = torch.randint(100, config.vocab_size, (1, args.length), device=device)
    with torch.no_grad(), bigbird_plus.context_parallel(dist.group.WORLD) as processes:
        states = model(input_ids).last_hidden_state
    sent = processes.bytes_sent / args.layers / 2**20
    print(f"process {processes.rank}: {states.shape[1]:,} tokens, {sent:.2f} MiB sent a layer", flush=True)
    if args.check:
        states = processes.gather(states)
        if processes.rank == 0:
            with torch.no_grad():
                alone = model(input_ids).last_hidden_state
            print(f"largest difference from one process: {(states - alone).abs().max():.1e}")
        dist.barrier()
    dist.destroy_process_group()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="compare with what the first process computes alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
