"""Evaluation: tasks, methods, the harness, its figures and reports.

The same few objects are the Python API::

    from checkpoints.pretrained import load_pretrained
    from data.conversations import prompt_ids
    from modules.contracts.sampling import Sampling
    from modules.target.loading import load_target, own_device
    from modules.decoding.decoder import SpeculativeDecoder

    # A Hub id, a folder, a .gguf file, or this embedded model.
    target = load_target("smollm2-135m", device=own_device())
    # A run folder, a drafter folder or a Hub id.
    drafter = load_pretrained("runs/clover", target)
    drafter.to(target.device, target.dtype)
    decoder = SpeculativeDecoder(drafter.adapt(target), drafter)
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    ids = prompt_ids(question, target.tokenizer)
    trace = decoder.decode([ids], Sampling(temperature=0.0), limit=64)[0]
    print(target.tokenizer.decode(trace.ids), trace.accepted)

and an evaluation is::

    from pathlib import Path
    from eval.evaluation import Evaluation, evaluate
    report = evaluate(Evaluation(drafters=["runs/clover"], limit=1), Path("runs/eval/clover"))
"""
