# Two devices in one IOMMU group: refused one by one with the other named, hidden as a whole, given back as a whole
MACHINE=linux
EDU=0000:03:01.0
CARD=0000:03:02.0
both_on_vfio() { driven_by vfio-pci $EDU && driven_by vfio-pci $CARD; }
both_hidden() { hidden $EDU && hidden $CARD; }
doctor_says() { pciback doctor $EDU | grep "$1"; }
in_use_elsewhere() {
  bind_vfio $EDU || return
  exec 9<>"/dev/vfio/$1" || return
  refused "fuser" pciback hide --group $CARD || return
  exec 9>&-
  unbind_vfio $EDU
}
without_vfio() {
  mv /dev/vfio/vfio /dev/vfio/away
  refused "modprobe vfio-pci" pciback hide --group $EDU
  local status=$?
  mv /dev/vfio/away /dev/vfio/vfio
  return $status
}
# Both or none of it, as VFIO and the host can have it
all_or_none() { { both_hidden && both_on_vfio; } || { driven_by e1000 $CARD && no_record $CARD && no_record $EDU; }; }
no_record() { [ ! -e "$RUN_DIR/devices/$1" ]; }
is_locked() { grep -q ":$(stat -c %i "$RUN_DIR/lock") " /proc/locks; }
# Being hidden, or given back, by its record: the phase is a word behind two double words (src/host/record/mod.rs)
half_way() {
  local device
  for device in $EDU $CARD; do
    case $(od -An -tu4 -j16 -N4 "$RUN_DIR/devices/$device" 2>/dev/null | tr -d ' ') in 1 | 5) return 0 ;; esac
  done
  return 1
}
# A few seconds, and no pauses: it does not last
until_half_way() {
  local looks=0
  until half_way; do
    looks=$((looks + 1))
    [ $looks -lt 500 ] || return
  done
}
# Killed when it has begun, and at points after that
killed_while() {
  local after asked hits=0
  for after in 0 0.02 0.05 0.1 0.2 0.4; do
    is_locked || return
    pciback "$@" &
    asked=$!
    until_half_way || echo "it was not seen to begin"
    sleep $after
    kill_backend
    # It may be in the kernel, which lets it end what it is at
    wait_for 20 not is_locked || return
    ! half_way || hits=$((hits + 1))
    start_backend || return
    # Whoever asked is told nothing
    wait $asked
    wait_for 20 all_or_none || return
    # As it is to be for the next try
    case "$1" in
      hide) no_record $EDU || pciback unhide --group $EDU || return ;;
      *) ! no_record $EDU || pciback hide --group $EDU || return ;;
    esac
  done
  echo "VALUE killed_half_way.$1 $hits times"
  [ $hits -gt 0 ]
}
at_start() {
  mkdir -p /etc/pciback
  echo "hide = [\"$CARD\", \"$EDU\"]" >/etc/pciback/pcibackd.toml
  restart_killed && wait_for 20 both_hidden
}

story() {
  local group
  must "pcibackd runs on the embedded Xen with the machine's devices" start_backend
  group=$(group_of $EDU)
  check "edu and e1000 are in one group" [ "$group" = "$(group_of $CARD)" ]
  check "and e1000 has its driver" driven_by e1000 $CARD
  check "edu alone is refused, with what is in the way" refused "group $group also holds $CARD, bound to e1000" pciback hide $EDU
  check "and with the remedy" refused "pciback hide --group $EDU" pciback hide $EDU
  check "doctor says how it is reached, and what is in the way" doctor_says "group $group also holds $CARD"
  check "nothing has changed" driven_by e1000 $CARD
  check "edu has no driver still" not driven_by vfio-pci $EDU
  check "what another program has open is refused, and the remedy told" in_use_elsewhere "$group"
  check "nothing stays half-way" driven_by e1000 $CARD
  check "nor is anything taken without VFIO" without_vfio
  check "and nothing stays half-way" driven_by e1000 $CARD
  check "nor of edu" not driven_by vfio-pci $EDU
  check "the group is hidden as a whole" has "with $CARD" pciback hide --group $EDU
  check "both are bound to vfio-pci" both_on_vfio
  check "both are listed as hidden" both_hidden
  check "the bridge above stays as it was" not driven_by vfio-pci 0000:02:00.0
  check "one alone is not given back" refused "goes back to dom0 together" pciback unhide $CARD
  check "edu is reset with its bus" has "reset" pciback reset --method bus $EDU
  must "a guest gets one of them" new_guest one $EDU
  check "and can use it" drive one edu identify dma
  check "no other guest gets the other one" refused "attaching" new_guest two $CARD
  check "the log says why" grep "it is in group $group together with $EDU, which domain" $LOG
  check "the guest can still use its device" drive one edu dma
  check "it copies where the guest has given it nothing" drive one edu stray
  check "pcibackd tells of it, though the bridge has asked" wait_for 5 grep "$EDU (or another .*), which domain $(domid one) has, was to write" $LOG
  check "what a guest has of a group is not given back" refused "in use by domain" pciback unhide --group $CARD
  check "the guest ends" end_guest one
  check "both are hidden still" both_hidden
  must "a guest gets all of the group" new_guest all $EDU $CARD
  check "can use edu" drive all:1 edu identify dma
  check "and has e1000 beside it" has 100e8086 drive all:2 function ids
  check "which answers" drive all:2 function answers
  check "that guest ends" end_guest all
  check "and both are hidden still" both_hidden
  check "the group is given back as a whole" pciback unhide --group $EDU
  check "e1000 has its driver again" driven_by e1000 $CARD
  check "edu has none, as before" not driven_by vfio-pci $EDU
  check "a kill while it is hidden leaves all of it hidden, or nothing" killed_while hide --group $EDU
  must "it is hidden as a whole" pciback hide --group $EDU
  check "a kill while it is given back does as well" killed_while unhide --group $EDU
  check "and it is given back as a whole then" pciback unhide --group $EDU
  check "e1000 has its driver then" driven_by e1000 $CARD
  check "a device that is alone in its group is hidden by itself" pciback hide 0000:00:05.0
  check "is bound to vfio-pci" driven_by vfio-pci 0000:00:05.0
  check "and can be read" has "Vendor ID" pciback show 0000:00:05.0
  check "after a kill it is taken up again" restart_killed
  check "and is hidden still" hidden 0000:00:05.0
  check "it is given back" pciback unhide 0000:00:05.0
  check "without a driver, as before" not driven_by vfio-pci 0000:00:05.0
  check "a group that the configuration names as a whole is hidden at start" at_start
}
