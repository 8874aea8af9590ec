#!/usr/bin/env bash
# flwr 1.42.0 with ray 2.55.1, Python 3.11.
#
# Where the process of one client ends in Flower's simulation, as one does that runs out of memory,
# every later message to every client of that process is lost, in all rounds to come: its Ray actor is
# put back into the pool, at the end from which the next one is taken, and no other is started. The
# server sees an error of code 0 for each. Clients live in as many actors as fit the processors, so
# that on a small machine one bad client is the end of all. What stands among the resources of a
# client is handed on to Ray, and so `max_restarts` there starts the process anew; with
# `max_task_retries` messages wait for it.
#
# Output seen (one actor for four clients, the process of client 0 ends at each message; whose turn
# comes before its first one answers in round 1), beside what Ray says of processes that died:
#   answers in rounds 1 and 2: [[], []]
#   with max_restarts: [[1, 2, 3], [1, 2, 3]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "flwr[simulation]==1.42.0" "ray==2.55.1"
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import logging
import os
import time

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import flwr.serverapp
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.simulation import run_simulation

logging.getLogger("flwr").setLevel(logging.CRITICAL)
NODES, PROCESSORS = 4, os.cpu_count()


def simulated(**more):
    """Which of four clients answer in two rounds, where the process of client 0 dies."""
    client, server, found = ClientApp(), flwr.serverapp.ServerApp(), []

    @client.query("ask")
    def ask(message, context):
        number = int(context.node_config["partition-id"])
        if number == 0:
            os._exit(1)  # as one does that runs out of memory
        return Message(RecordDict({"own": ConfigRecord({"number": number})}), reply_to=message)

    @server.main()
    def main(grid, context):
        while len(nodes := list(grid.get_node_ids())) < NODES:
            time.sleep(0.2)
        for _ in range(2):
            messages = [Message(RecordDict(), node, "query.ask") for node in nodes]
            replies = grid.send_and_receive(messages, timeout=900)
            good = [reply for reply in replies if not reply.has_error()]
            found.append(sorted(int(reply.content["own"]["number"]) for reply in good))

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=NODES,
        # All processors for one process, so that the order of messages does not matter.
        backend_config={
            "client_resources": {"num_cpus": PROCESSORS, **more},
            "init_args": {"log_to_driver": False, "num_cpus": PROCESSORS},
        },
    )
    return found


as_it_is = simulated()
print(f"answers in rounds 1 and 2: {as_it_is}")
restarted = simulated(max_restarts=-1, max_task_retries=1)
print(f"with max_restarts: {restarted}")
assert as_it_is[1] == [] and restarted == [[1, 2, 3]] * 2, "That is no longer so."
PYTHON
