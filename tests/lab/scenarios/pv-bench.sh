# speed and size, side by side with the stock backend in one boot: stock, pcibackd, pcibackd, stock, each with the same guest
ALONE=yes
TIMEOUT=900
GUEST_TIMEOUT=200
story() {
  turn=0
  for BACKEND in stock pcibackd pcibackd stock; do
    turn=$((turn + 1))
    round
  done
  for name in conf_read_median conf_read_p99 conf_write_median connect; do ratio $name; done
}

round() {
  local watcher begin
  must "$BACKEND starts" start_backend
  must "xl takes the card" xl pci-assignable-add 00:05.0
  # the dom0 that has just booted has numbered no other domain
  note_connected $turn &
  watcher=$!
  begin=$(hundredths)
  must "a guest starts with it" create_guest pv 'pci=["00:05.0"]'
  wait $watcher
  figure connect "$(seconds $(($(cat $STATE/connected) - begin)))" s
  # Other work on the host can only make it slower: three times, and the quietest counts
  must "the guest measures" guest pv "for i in 1 2 3; do lab-guest bench 0000:00:00.0 3000; done >/tmp/bench"
  guest pv cat /tmp/bench >$STATE/bench
  figure conf_read_median "$(least read 2)" us
  figure conf_read_p99 "$(least read 3)" us
  figure conf_write_median "$(least write 2)" us
  figure conf_write_p99 "$(least write 3)" us
  [ $turn != 2 ] || size
  check "the guest ends" destroy pv
  must "$BACKEND gives the card back and stops" stop_backend
}

# Writes down when the frontend of a domain-to-be says that it is connected
note_connected() { each_change 100 "/local/domain/$1/device/pci/0/state" is_connected "$1" && hundredths >$STATE/connected; }

is_connected() { [ "$(xenstore-read "/local/domain/$1/device/pci/0/state" 2>/dev/null)" = 4 ]; }

figure() {
  echo "$2" >>$STATE/$BACKEND.$1
  echo "VALUE $1.$BACKEND.$turn $2 $3"
}

# least KIND COLUMN: the smallest figure of that kind
least() { awk -v kind="$1" -v column="$2" '$1 == kind {print $column}' $STATE/bench | sort -n | sed -n 1p; }

# Mean of ours by mean of theirs: in the order A-B-B-A, what slows all of it down evenly cancels out
ratio() {
  awk -v name=$1 'FNR == 1 {file++} {sum[file] += $1; count[file]++}
    END {printf "RATIO %s %.3f\n", name, (sum[1] / count[1]) / (sum[2] / count[2])}' $STATE/pcibackd.$1 $STATE/stock.$1
}

# With one guest, idle
size() {
  local daemon keeper before
  daemon=$(cat $STATE/pid)
  keeper=$(grep -l pciback-keeper /proc/[0-9]*/comm | cut -d/ -f3)
  echo "VALUE memory.keeper $(resident $keeper) KiB"
  echo "VALUE memory $(resident $daemon) KiB"
  before=$(switches $daemon)
  sleep 10
  echo "VALUE idle_switches $(($(switches $daemon) - before)) per-10s"
}

resident() { awk '/^VmRSS/ {print $2}' /proc/$1/status; }

switches() { cat /proc/$1/task/*/status | awk '/ctxt_switches/ {sum += $2} END {print sum}'; }
