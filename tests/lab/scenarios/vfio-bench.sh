# what pcibackd costs a guest on VFIO, beside bare VFIO in one boot: bare, pcibackd, pcibackd, bare; and registers that are not mapped
MACHINE=linux
ALONE=yes
TIMEOUT=400
EDU=0000:00:05.0
story() {
  local turn=0 who name default="$PCIBACKD_FLAGS"
  PCIBACKD_FLAGS="$default --map-bars"
  for who in bare pcibackd pcibackd bare; do
    turn=$((turn + 1))
    round_$who || return
    for name in config_read register_read interrupt line; do figure $name "$(least $name)"; done
  done
  for name in config_read register_read interrupt line; do ratio $name; done
  check "a register that is mapped is read as on bare VFIO" at_most 1.3 register_read
  PCIBACKD_FLAGS="$default"
  turn=$((turn + 1)) who=pcibackd
  round_default || return
  figure register_trapped "$(least register_trapped)"
}

round_bare() {
  must "edu is bound to vfio-pci by hand" bind_vfio $EDU
  must "a bare program measures" measure vfio:$EDU mapped bench
  must "edu is given back" unbind_vfio $EDU
}

round_pcibackd() {
  must "pcibackd starts" start_backend
  must "edu is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  must "a guest with its registers mapped measures" measure one mapped bench
  must "the guest ends" end_guest one
  must "pcibackd stops" stop_backend
}

# As it is unless somebody says otherwise
round_default() {
  must "pcibackd starts, whose guests may not map registers" start_backend
  must "edu is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  must "a guest measures its registers" measure one trapped
}

# Other work on the host can only make it slower: three times, and the quietest counts
measure() {
  local _ place="$1"
  shift
  for _ in 1 2 3; do drive "$place" edu "$@" || return; done >$STATE/bench
  cat $STATE/bench
}

least() { awk -v name="$1" '$1 == name {print $2}' $STATE/bench | sort -n | sed -n 1p; }

figure() {
  echo "$2" >>$STATE/$who.$1
  echo "VALUE $1.$who.$turn $2 us"
}

# Times, so that above 1 pcibackd is slower
ratio() {
  awk -v name="$1" 'FNR == 1 {file++} {sum[file] += $1} END {printf "RATIO %s_time %.3f\n", name, sum[1] / sum[2]}' $STATE/pcibackd.$1 $STATE/bare.$1
}

# at_most LIMIT FIGURE: the quietest turn of each, for the same reason
at_most() { awk -v most="$1" -v ours="$(quietest pcibackd $2)" -v bare="$(quietest bare $2)" 'BEGIN {print ours, bare; exit !(ours <= most * bare)}'; }
quietest() { sort -n $STATE/$1.$2 | sed -n 1p; }
