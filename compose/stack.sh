#!/bin/sh
# The stack's life for newcomers: stack.sh up | down | compose ARGUMENTS… (any other docker compose command).
# ENV_FILE names the settings (.env), READY_S bounds the wait, VOLUMES=1 makes `down` remove the data too.
set -eu
cd "$(dirname "$0")/.."
env_file=${ENV_FILE:-.env}

die() {
  echo "splitserve: $*" >&2
  exit 1
}

find_compose() {
  command -v docker >/dev/null || die "docker is not installed: see docs.docker.com/get-docker; without it, make up starts everything too"
  docker info >/dev/null 2>&1 || die "no Docker engine answers to 'docker info': start it, or join the group docker; without it, make up starts everything too"
  if docker compose version >/dev/null 2>&1; then
    compose="docker compose"
  elif command -v docker-compose >/dev/null; then
    compose=docker-compose
  else
    die "docker has no 'docker compose' and there is no docker-compose: install the Compose plugin"
  fi
}

dc() {
  $compose --env-file "$env_file" "$@"
}

secret() {
  od -An -N20 -tx1 /dev/urandom | tr -d ' \n'
}

threads() { # of each worker, when one of each phase shares the cores
  cores=$(getconf _NPROCESSORS_ONLN)
  echo $((cores > 3 ? cores / 2 : 1))
}

write_env() {
  [ -e "$env_file" ] && return
  umask 077
  while IFS= read -r line; do
    case $line in
      *_PASSWORD=) line=$line$(secret) ;;
      THREADS=) line=$line$(threads) ;;
    esac
    printf '%s\n' "$line"
  done <.env.example >"$env_file.new"
  mv "$env_file.new" "$env_file"
  echo "wrote $env_file, with new passwords"
}

# Runs in the router's container: its port for probes, then the name that clients use.
ready='import urllib.request
from splitserve.config import ModelSettings
from splitserve.model.resolve import served_names
urllib.request.urlopen("http://127.0.0.1:9400/ready", timeout=5)
print(served_names(ModelSettings())[0])'

wait_ready() {
  limit=${READY_S:-600}
  give_up=$(($(date +%s) + limit))
  until model=$(dc exec -T router python -c "$ready" 2>/dev/null); do
    [ "$(date +%s)" -lt "$give_up" ] || die "not ready after $limit s; see: compose/stack.sh compose logs router prefill decode"
    sleep 1
  done
}

up() {
  write_env
  dc build
  dc up -d --remove-orphans
  echo "waiting until a generation has gone through both phases"
  wait_ready
  address=$(dc port router 8000)
  echo
  echo "$model answers at http://$address/v1. make down-compose stops everything. Try:"
  echo
  echo "curl http://$address/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}], \"max_tokens\": 64}'"
  echo
  echo "Prometheus: http://$(dc port prometheus 9090), the view over several stacks: http://$(dc port prometheus-federation 9090)"
}

down() {
  [ -e "$env_file" ] || die "there is no $env_file: nothing was started with it"
  dc --profile grafana down --remove-orphans ${VOLUMES:+--volumes}
}

case ${1:-} in
  up) find_compose && up ;;
  down) find_compose && down ;;
  compose) shift && find_compose && dc "$@" ;;
  *) sed -n '2,3s/^# //p' "$0" >&2 && exit 2 ;;
esac
