# Sourced by scripts/test: sees to it that Redis and RabbitMQ answer, and says where.
# A broker that runs already is used as it is; else one is started on a free port, in a folder that
# goes when the script ends; else it is installed first, where apt-get is there and may.

answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

install() {
    command -v "$1" >/dev/null && return
    echo "installing $2" >&2
    { command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] &&
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$2"; } \
        >/dev/null 2>&1 || echo "cannot install $2; its tests will say so" >&2
}

wait_until_answers() {
    for _ in $(seq 300); do answers 127.0.0.1 "$1" && return; read -rt 0.2 <> <(:) || true; done
    echo "nothing answers on port $1" >&2
}

brokers_dir=""
stop_brokers() {
    [ -n "$brokers_dir" ] || return 0
    for file in "$brokers_dir"/*.pid; do [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null; done
    rm -rf "$brokers_dir"
}

if [ -z "${KQ_TEST_REDIS_URL:-}" ]; then
    if answers 127.0.0.1 6379; then
        export KQ_TEST_REDIS_URL=redis://127.0.0.1:6379/0
    else
        install redis-server redis-server
        if command -v redis-server >/dev/null; then
            brokers_dir="${brokers_dir:-$(mktemp -d)}"
            port=$(free_port)
            redis-server --port "$port" --bind 127.0.0.1 --dir "$brokers_dir" --save "" --appendonly no \
                >"$brokers_dir/redis.log" 2>&1 &
            echo $! >"$brokers_dir/redis.pid"
            wait_until_answers "$port"
            export KQ_TEST_REDIS_URL="redis://127.0.0.1:$port/0"
        fi
    fi
fi

if [ -z "${KQ_TEST_AMQP_URL:-}" ]; then
    if answers 127.0.0.1 5672; then
        export KQ_TEST_AMQP_URL=amqp://guest:guest@127.0.0.1:5672
    else
        install rabbitmq-server rabbitmq-server
        if command -v rabbitmq-server >/dev/null; then
            brokers_dir="${brokers_dir:-$(mktemp -d)}"
            port=$(free_port)
            mkdir -p "$brokers_dir/mnesia" "$brokers_dir/log"
            echo '[].' >"$brokers_dir/plugins"
            chmod 755 "$brokers_dir"
            id rabbitmq >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && chown -R rabbitmq "$brokers_dir"
            RABBITMQ_NODENAME="kqtest$port@localhost" RABBITMQ_NODE_PORT=$port RABBITMQ_DIST_PORT=$(free_port) \
                RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_MNESIA_BASE="$brokers_dir/mnesia" \
                RABBITMQ_LOG_BASE="$brokers_dir/log" RABBITMQ_PID_FILE="$brokers_dir/rabbitmq.pid" \
                RABBITMQ_ENABLED_PLUGINS_FILE="$brokers_dir/plugins" rabbitmq-server -detached >/dev/null 2>&1
            wait_until_answers "$port"
            export KQ_TEST_AMQP_URL="amqp://guest:guest@127.0.0.1:$port"
        fi
    fi
fi
