# each way in which a guest may end, timed in one boot with the stock backend and with pcibackd, which keeps nobody waiting and leaves nothing behind
ALONE=yes
TIMEOUT=900
story() {
  local way
  for BACKEND in stock pcibackd; do
    played=$BACKEND
    must "$BACKEND starts" start_backend
    check "xl takes a card" xl pci-assignable-add 00:05.0
    check "and another" xl pci-assignable-add 01:00.0
    lives
    [ $BACKEND = stock ] || without_frontend
    must "$BACKEND gives the cards back and stops" stop_backend
  done
  for way in shutdown crash reboot destroy; do
    echo "RATIO $way $(awk 'NR == FNR {ours = $1; next} {printf "%.3f", ours / $1}' $STATE/pcibackd.$way $STATE/stock.$way)"
  done
}

# One guest for each way to end
lives() {
  life shutdown 2 "00:05.0 01:00.0"
  life crash 1 00:05.0
  life reboot 1 00:05.0
  life destroy 0 00:05.0
}

# life WAY WAITS DEVICES: WAITS is how often libxl waits in vain for the stock backend, 10 s each time. pcibackd's takes no more than a second longer
# than stock's would without these. A busy host makes us slow: the best of three.
life() {
  local way=$1 waits=$2 begin try
  for try in 1 2 3; do
    must "$played: a guest starts" create_guest pv 'on_crash="destroy"' "$(devices $3)"
    check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
    begin=$(hundredths)
    check "$played: $way" $way pv
    echo $(($(hundredths) - begin)) >$STATE/$played.$way
    echo "VALUE $way.$played $(seconds "$(cat $STATE/$played.$way)") s"
    if [ $way = reboot ]; then
      check "the card is there again, and pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
      check "destroy" destroy pv
    fi
    [ $played = pcibackd ] || return
    check "nothing is left of it" wait_for 5 nothing_left
    in_time $way $waits && break
  done
  check "$way takes at most a second longer than with stock, less its $waits waits of 10 s" in_time $way $waits
}

# What only pcibackd does: with the stock backend, libxl waits 10 s for each device, and a driver that is loaded anew is never connected
without_frontend() {
  must "a guest starts that runs no frontend" create_guest pv "$(devices 00:05.0 01:00.0)" "extra=\"$GUEST_KERNEL nopcifront\""
  ends_at_once
  must "a guest starts" create_guest pv "$(devices 00:05.0 01:00.0)"
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  check "it unloads xen-pcifront" guest pv unload_pcifront
  check "it has no devices then" guest pv 'has_devices ""'
  check "a device comes and goes at once all the same" detach_and_attach 01:00.0
  check "it loads xen-pcifront again" guest pv modprobe xen-pcifront
  check "it pings as before" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "with both devices" guest pv 'has_devices "10d3 10d3"'
  check "it unloads xen-pcifront once more" guest pv unload_pcifront
  ends_at_once
}

ends_at_once() {
  local begin
  begin=$(hundredths)
  check "it is destroyed at once" no_wait destroy pv
  echo "VALUE destroy_without_frontend $(seconds $(($(hundredths) - begin))) s"
  check "nothing is left of it" wait_for 5 nothing_left
}

detach_and_attach() { no_wait xl pci-detach pv $1 && no_wait xl pci-attach pv $1; }

in_time() { [ "$(cat $STATE/pcibackd.$1)" -le $(($(cat $STATE/stock.$1) - $2 * 1000 + 100)) ]; }

# devices BDF...: the line for xl
devices() {
  local list
  for device in "$@"; do list="$list\"$device\","; done
  echo "pci=[$list]"
}

shutdown() { shut_down $1; }

# A guest that has crashed does not answer
crash() { tell $1 'echo c >/proc/sysrq-trigger' && wait_for 60 guest_is_gone $1; }

# Until it takes commands again, under another number
reboot() {
  local id
  id=$(xl domid $1)
  xl reboot $1 && wait_for 60 is_another $1 $id && wait_for 60 guest_is_ready $1
}

is_another() { local now; now=$(xl domid $1 2>/dev/null) && [ $now != $2 ]; }
