#!/bin/sh
# Make the secrets of compose.yaml, each a file that only you may read; those that are there already stay.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
for name in ray_token postgres_password mlflow_password mlflow_key; do
    [ -s "secrets/$name" ] || od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > "secrets/$name"
done
printf '[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = %s\n' \
    "$(cat secrets/mlflow_password)" > secrets/mlflow_credentials
