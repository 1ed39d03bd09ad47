#!/usr/bin/env bash
# Starts this machine's ranks of a run over several machines. Run it once on each, with the same arguments:
#   NNODES=2 NODE_RANK=0 HEAD=node0:29400 docker/launch.sh tools/train.py +model=NAME key=value ...
#   NNODES=2 NODE_RANK=1 HEAD=node0:29400 docker/launch.sh tools/train.py +model=NAME key=value ...
# The Slurm and Kubernetes files run this script too. docs/clusters.md explains the settings.
#
#   NNODES          machines of the run
#   NODE_RANK       0 on the machine that HEAD names, where the others meet; under Slurm SLURM_NODEID by default
#   HEAD            HOST:PORT of that machine as the others reach it; the port must be free there
#   RUN_ID          a name that no other run with the same HEAD uses (megadpo)
#   RANKS_PER_NODE  ranks on this machine (gpu: one for each GPU)
#   NODE_ADDRESS    address of this machine for the others, where its host name is not one
#   JOIN_TIMEOUT_S  seconds to wait for the other machines (900)
#   MAX_RESTARTS    how often all ranks are started again when one has failed (0); needs train.resume=auto
#   SAVE_WITHIN_S   seconds that ranks have to save when torchrun is stopped by a signal, before they are killed (600)
set -euo pipefail

repository="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
usage="see the head of docker/launch.sh"
nodes="${NNODES:?"set it to the number of machines; $usage"}"
head="${HEAD:?"set it to HOST:PORT of the machine with NODE_RANK=0; $usage"}"
node_rank="${NODE_RANK:-${SLURM_NODEID:?"set NODE_RANK to this machine's number, from 0; $usage"}}"
tool="${1:?"name the tool to run, such as tools/train.py; $usage"}"
shift
wait_s="${JOIN_TIMEOUT_S:-900}"
# Not guessed from host names: after a wrong guess every machine would wait for another one to be the host.
is_host=false
if [[ "$node_rank" == 0 ]]; then is_host=true; fi

# With one queue to the GPU, kernels start in the order of their launch; Megatron's overlap of tensor-parallel
# communication with matrix products relies on that order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# NCCL names its version and what goes wrong, nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# torchrun keeps its store over a restart, and the new ranks would use the addresses of the old ones in it. With this
# variable rank 0 creates a new store each time.
restarts="${MAX_RESTARTS:-${PET_MAX_RESTARTS:-0}}"
if [[ "$restarts" != 0 ]]; then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; fi

# Torchrun forwards these to the ranks, which save and end. Older versions support neither variable: they forward
# SIGTERM only, and kill after 30 seconds.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SAVE_WITHIN_S:-600}"

# exec: signals reach torchrun itself.
exec torchrun --nnodes "$nodes" --nproc-per-node "${RANKS_PER_NODE:-gpu}" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "${RUN_ID:-megadpo}" \
  --rdzv-conf "is_host=$is_host,join_timeout=$wait_s,read_timeout=$wait_s" \
  ${NODE_ADDRESS:+--local-addr "$NODE_ADDRESS"} \
  "$repository/$tool" "$@"
