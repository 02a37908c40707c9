# Functions that fetch packages of a given Debian suite without installing them.
# Sourced by setup.sh and by ../iotests/run.sh; never run on its own.
#
# Everything goes through a private apt state below the folder given to debian_apt_init, so that neither the
# machine's package lists, nor its installed packages, nor another apt that runs at the same time is involved.

# say MESSAGE... : what is being done, on stderr, so that functions can still answer on stdout
say() { printf '%s: %s\n' "${SAY_AS:-lab}" "$*" >&2; }

# die MESSAGE... : the end, loudly
die() { printf '%s: error: %s\n' "${SAY_AS:-lab}" "$*" >&2; exit 1; }

# retry COMMAND... : up to three attempts; a mirror in the middle of an update, or a dropped connection, is not a failure
retry() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return 0
        say "attempt $attempt failed: $*"
        sleep $((attempt * 3))
    done
    return 1
}

# debian_mirror : the address of the Debian archive this machine is configured to use
debian_mirror() {
    local mirror
    # The configuration may be in either of apt's two notations, so apt itself is asked. Security and third-party
    # archives do not carry whole releases; the archive that does is the one with a plain release name.
    mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' |
        awk '$3 == "main" && $2 !~ /[-\/]/ && ($4 == "Debian" || ($4 == "" && $1 ~ /debian/)) && !seen++ { print $1 }')
    [ -n "$mirror" ] || die "found no Debian archive in the apt configuration of this machine (run apt-get update once?)"
    printf '%s\n' "$mirror"
}

# debian_apt_init FOLDER TYPE SUITE... : prepares a private apt state; TYPE is deb or deb-src
debian_apt_init() {
    local folder=$1 type=$2 suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror
    shift 2
    [ -r "$keyring" ] || die "$keyring is missing (package debian-archive-keyring)"
    mirror=$(debian_mirror) || exit 1
    mkdir -p "$folder"/{lists,archives}/partial "$folder/preferences.d"
    : > "$folder/status"
    for suite in "$@"; do
        # A mirror that lags keeps an expired date; the signatures are checked all the same.
        printf '%s [signed-by=%s check-valid-until=no] %s %s main\n' "$type" "$keyring" "$mirror" "$suite"
    done > "$folder/sources.list"
    cat > "$folder/apt.conf" <<CONF
Dir::Etc::sourcelist "$folder/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "$folder/preferences.d";
Dir::State::lists "$folder/lists";
Dir::State::status "$folder/status";
Dir::Cache::archives "$folder/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
APT::Default-Release "$1";
APT::Get::List-Cleanup "false";
Acquire::Retries "3";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
CONF
    DEBIAN_APT=$folder
    retry debian_apt get update -qq || die "could not fetch the package lists of $*"
}

# debian_apt get|cache ARGUMENT... : apt-get or apt-cache on the private state
debian_apt() {
    local program=$1
    shift
    APT_CONFIG=$DEBIAN_APT/apt.conf "apt-$program" "$@"
}
