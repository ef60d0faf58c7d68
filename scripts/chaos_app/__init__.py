"""The chaos harness: a queue under fire, and a checker that knows what each job was owed. `./scripts/chaos --help`.

    run         the command line
    scenarios   what is done in a run: the mixed one, kill schedules, a survivor, a cut at every byte
    workload    the jobs of a run, by seed           jobs, heavy   the jobs themselves
    nemeses     what is done to the system, by seed  proxy, disk, fakeclock   what some of them need
    world       the processes of a run, and the loop that keeps them
    book        marks that survive SIGKILL           dispatcher   the process that dispatches
    checker     marks and faults in, verdict out     report       the verdict as a table

What is under test is used as a user would use it: kqueued, the client and the kqueue command. `kqueue.brokers` is read in one
place only, for the names of the replies that are cut (proxy).
"""
