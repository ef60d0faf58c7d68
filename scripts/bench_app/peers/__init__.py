"""The other queues that KQueue is compared with: what runs in their virtual environments, and the table of their settings.

`table` names every peer, its pinned requirements, and the command of each of its workers: all settings at a glance. Beside it is
one module for each peer, which its worker and `send` import. All have the same few names:

    one(work, *args)            put one job of `work` ("noop", "late", "parked", "http") into the queue
    many(work, args, count)     the same `count` times in the peer's own way of doing that in bulk; absent where it has none
    close()                     absent where there is nothing to close

and the jobs themselves in the peer's own manner. Each of them may be a coroutine function. The jobs' bodies are in `work`, the
same for all. Nothing of KQueue is imported here, except by `ours`, which is KQueue's job for the comparison.
"""
