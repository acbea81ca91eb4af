"""Merge engine. Usable alone: it imports only the version, `bot.errors`, `bot.progress` and `bot.storage`.

    streaming/     tools of the methods: inputs chunk by chunk, sums, selections, masks (torch)
    methods/       one file per family of methods: parameters, kernel, memory; a registry that loads without torch
    recipe/        text -> Recipe: the guard and the language
    checkpoints/   folder | Hub -> Checkpoint, Adapter: headers and configs only
    tokenizer/     vocabularies -> which row of which matrix each token takes; chat templates
    planning/      Recipe + Checkpoints -> Plan
    execution/     Plan + folders -> OUT: engine, workers, operand views, writer, provenance, stages, verification

Each imports only those above it (tests/test_house.py). Planning starts without torch.
"""
