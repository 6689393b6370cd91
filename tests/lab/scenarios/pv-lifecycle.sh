# each way in which a guest may end, timed in one boot with the stock backend and with pcibackd, which keeps nobody waiting and leaves nothing behind
ALONE=yes
TIMEOUT=1800
story() {
  local all="shutdown crash reboot destroy hang" ways round way late
  ways=$all
  for round in 1 2 3; do
    for BACKEND in stock pcibackd pcibackd stock; do lives "$ways"; done
    late=""
    for way in $ways; do
      if ! in_time $way || { [ $way = reboot ] && ! starts_in_time; }; then late="$late $way"; fi
    done
    # a busy host makes either of them slow: those again
    ways=$late
    [ "$ways" ] || break
  done
  for way in $all; do
    check "$way takes at most a second longer than with stock, less libxl's vain waits of $(vain_waits $way) s" in_time $way
    ratio $way
  done
  check "a rebooted guest starts in at most half as long again as with stock" starts_in_time
  ratio start
}

ratio() { echo "RATIO $1 $(awk -v ours="$(best pcibackd $1)" -v stock="$(best stock $1)" 'BEGIN {printf "%.3f", ours / stock}')"; }

# lives WAYS: a guest for each way to end
lives() {
  must "$BACKEND starts" start_backend
  check "xl takes a card" xl pci-assignable-add 00:05.0
  check "and another" xl pci-assignable-add 01:00.0
  for way in $1; do life $way; done
  guest_is_gone pv || check "the guest ends" destroy pv
  must "$BACKEND gives the cards back and stops" stop_backend
}

# life WAY: of a guest that ends so. It is a new one, or the one that was rebooted.
life() {
  local begin now ended cards=00:05.0
  [ $1 != shutdown ] || cards="00:05.0 01:00.0"
  if guest_is_gone pv; then must "$BACKEND: a guest starts" create_guest pv 'on_crash="destroy"' "$(devices $cards)"; fi
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  rm -f $STATE/ended
  begin=$(hundredths)
  check "$BACKEND: $1" $1 pv
  now=$(hundredths)
  ended=$(cat $STATE/ended 2>/dev/null || echo $now)
  took $1 $((ended - begin))
  [ $1 != reboot ] || took start $((now - ended))
  [ $BACKEND = stock ] || [ $1 = reboot ] || check "nothing is left of it" wait_for 5 nothing_left
}

took() {
  echo $2 >>$STATE/$BACKEND.$1
  echo "VALUE $1.$BACKEND $(seconds $2) s"
}

# How long libxl waits in vain for the stock backend, 10 s each time. pcibackd's guests take no more than a second longer than stock's would
# without that. (For a guest that hangs, both wait.)
vain_waits() { case $1 in shutdown) echo 20 ;; crash | reboot) echo 10 ;; *) echo 0 ;; esac; }

# best BACKEND WAY: of as many lives as the other backend had, in hundredths
best() { sort -n $STATE/$1.$2 | sed -n 1p; }

in_time() { [ "$(best pcibackd $1)" -le $(($(best stock $1) - 100 * $(vain_waits $1) + 100)) ]; }

starts_in_time() { [ $((2 * $(best pcibackd start))) -le $((3 * $(best stock start))) ]; }

shutdown() { shut_down $1; }

# A guest that has crashed does not answer
crash() { tell $1 'echo c >/proc/sysrq-trigger' && wait_for 60 guest_is_gone $1; }

# Until it takes commands again, under another number. Its end is over when it has that; what follows is a guest's start, which takes ten times as
# long as all that the backend does, and differs by seconds on one side alone
reboot() {
  local id
  id=$(xl domid $1)
  xl reboot $1 && wait_for 60 is_another $1 $id && hundredths >$STATE/ended && wait_for 60 guest_is_ready $1
}

is_another() { local now; now=$(xl domid $1 2>/dev/null) && [ $now != $2 ]; }

# A guest whose processor does nothing more, and so does not answer either
hang() { xl pause $1 && destroy $1; }
