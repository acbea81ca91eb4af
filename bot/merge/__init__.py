"""The merge engine. Usable alone; of the bot it knows only `bot.errors` and the version.

    streaming/     tools of the methods: inputs chunk by chunk, sums, selections, masks (torch)
    methods/       one file per family of methods: parameters, kernel, memory; a registry that loads without torch
    recipe/        text -> Recipe: the guard and the language
    checkpoints/   folder | Hub -> Checkpoint, Adapter: headers and configs only
    tokens/        vocabularies -> which row of which matrix each token takes; chat templates
    planning/      Recipe + Checkpoints -> Plan
    operands/      what a step reads, chunk by chunk: stored tensors, LoRA patches, gathered rows
    execution/     Plan + folders -> OUT: the engine, workers, the writer, provenance, stages
    verify.py      is OUT what its provenance says?

Each imports only those above it (tests/test_house.py). Planning starts without torch.
"""
