"""System calls as reviewable data: numbers, and the stage that refuses or allows each.

Obeys docs/design/enclave.md, 4.

Only this file decides what a sealed process may ask of the kernel; `filters` turns it into BPF and
adds nothing. Every number is `(x86-64, aarch64)`, None where the architecture lacks the call, and
is compared with the kernel's own headers in a test. aarch64 is data only: no rung accepts it yet.
"""

from __future__ import annotations

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
ENABLED = ("x86_64",)

X32_BIT = 0x40000000
CEILING = 453  # highest number reviewed; anything above answers ENOSYS, so that libc falls back

EPERM, EACCES, ENOSYS = 1, 13, 38

_NETWORK = """
socket=41/198 connect=42/203 bind=49/200 listen=50/201 accept=43/202 accept4=288/242 sendto=44/206
sendmsg=46/211 sendmmsg=307/269 recvmsg=47/212 recvmmsg=299/243 setsockopt=54/208
getsockopt=55/209 getsockname=51/204 getpeername=52/205 socketpair=53/199
"""
# libc falls back from clone3 to clone, whose flags a filter can read.
_MISSING = "io_uring_setup=425/425 io_uring_enter=426/426 io_uring_register=427/427 clone3=435/435"
_PROCESSES = """
ptrace=101/117 process_vm_readv=310/270 process_vm_writev=311/271 pidfd_getfd=438/438
pidfd_open=434/434 pidfd_send_signal=424/424 kcmp=312/272 process_madvise=440/440
move_pages=279/239 get_robust_list=274/100 process_mrelease=448/448 fork=57/- vfork=58/-
setpriority=141/140 ioprio_set=251/30 sched_setparam=142/118 sched_setscheduler=144/119
sched_setattr=314/274
"""
_NAMESPACES = """
setns=308/268 unshare=272/97 mount=165/40 umount2=166/39 pivot_root=155/41 chroot=161/51
open_tree=428/428 move_mount=429/429 fsopen=430/430 fsconfig=431/431 fsmount=432/432 fspick=433/433
mount_setattr=442/442
"""
_KERNEL = """
bpf=321/280 perf_event_open=298/241 userfaultfd=323/282 keyctl=250/219 add_key=248/217
request_key=249/218 init_module=175/105 finit_module=313/273 delete_module=176/106
kexec_load=246/104 kexec_file_load=320/294 swapon=167/224 swapoff=168/225 reboot=169/142
acct=163/89 quotactl=179/60 quotactl_fd=443/443 syslog=103/116 settimeofday=164/170
clock_settime=227/112 adjtimex=159/171 clock_adjtime=305/266 sethostname=170/161
setdomainname=171/162 iopl=172/- ioperm=173/- open_by_handle_at=304/265 name_to_handle_at=303/264
fanotify_init=300/262 lookup_dcookie=212/18 vhangup=153/58 nfsservctl=180/42 personality=135/92
modify_ldt=154/- vmsplice=278/75 memfd_secret=447/447 migrate_pages=256/238 uselib=134/-
_sysctl=156/- create_module=174/- mknod=133/- mknodat=259/33
"""
_IPC = """
mq_open=240/180 mq_unlink=241/181 msgget=68/186 msgsnd=69/189 msgrcv=70/188 msgctl=71/187
semget=64/190 semop=65/193 semtimedop=220/192 semctl=66/191 shmget=29/194 shmat=30/196
shmctl=31/195 shmdt=67/197
"""
# What inference, decoding, RDKit and a Python interpreter ask for after warm-up, and no more.
_ALLOWED = """
read=0/63 close=3/57 fstat=5/80 poll=7/- lseek=8/62 munmap=11/215 brk=12/214 rt_sigaction=13/134
rt_sigprocmask=14/135 rt_sigreturn=15/139 pread64=17/67 sched_yield=24/124 mremap=25/216
madvise=28/233 nanosleep=35/101 getpid=39/172 exit=60/93 gettimeofday=96/169 sigaltstack=131/132
gettid=186/178 futex=202/98 sched_getaffinity=204/123
restart_syscall=219/128 clock_gettime=228/113 clock_nanosleep=230/115 exit_group=231/94
ppoll=271/73 set_robust_list=273/99 getcpu=309/168 getrandom=318/278 membarrier=324/283
rseq=334/293
"""
_RULED = """
clone=56/220 prlimit64=302/261 tgkill=234/131 write=1/64 mmap=9/222 mprotect=10/226
"""
# What the GPU driver's library asks for while kernels run; stage 1 still denies terminal ioctls.
_ASKED_BY_GPU = """
ioctl=16/29 openat=257/56 newfstatat=262/79 fcntl=72/25 memfd_create=319/279 ftruncate=77/46
mlock=149/228 munlock=150/229
"""
_EXEC = "execve=59/221 execveat=322/281"
# Called by the launcher, the probe and the waiting parent; no filter names them.
_OTHER = """
landlock_create_ruleset=444/444 landlock_add_rule=445/445
landlock_restrict_self=446/446 seccomp=317/277 prctl=157/167 capset=126/91 close_range=436/436
wait4=61/260 waitid=247/95 kill=62/129 tkill=200/130 recvfrom=45/207
mq_timedsend=242/182 unlinkat=263/35 utimensat=280/88
"""

Numbers = dict[str, tuple[int, int | None]]


def _read(text: str) -> Numbers:
    """Read `name=x86/aarch64` words."""
    out: Numbers = {}
    for word in text.split():
        name, _, pair = word.partition("=")
        x86, _, arm = pair.partition("/")
        out[name] = (int(x86), None if arm == "-" else int(arm))
    return out


# -- stage 1: what is refused from before exec on, and with which errno ---------------------------
# Errnos stay distinct (network EACCES, the rest EPERM), so that a log line names the blocker.
STAGE1: tuple[tuple[str, int, Numbers], ...] = (
    ("network", EACCES, _read(_NETWORK)),
    ("missing", ENOSYS, _read(_MISSING)),
    ("other processes", EPERM, _read(_PROCESSES)),
    ("namespaces and mounts", EPERM, _read(_NAMESPACES)),
    ("kernel surface", EPERM, _read(_KERNEL)),
    ("interprocess", EPERM, _read(_IPC)),
)
# -- no-exec: what the conversion program adds as its first act -----------------------------------
NO_EXEC: Numbers = _read(_EXEC)
# -- stage 2: all that is left after warm-up ------------------------------------------------------
STAGE2: Numbers = _read(_ALLOWED)
GPU: Numbers = _read(_ASKED_BY_GPU)  # profile worker-gpu, beside STAGE2

NUMBERS: Numbers = {
    name: pair
    for group in (
        *(calls for _, _, calls in STAGE1),
        STAGE2,
        GPU,
        NO_EXEC,
        _read(_RULED),
        _read(_OTHER),
    )
    for name, pair in group.items()
}

# -- arguments ------------------------------------------------------------------------------------
CLONE_THREAD = 0x00010000
CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag
TERMINAL_IOCTLS = (0x5412, 0x541C, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCSETD
PROT_EXEC = 0x4

CHANNEL_IN, CHANNEL_OUT, STDERR = 3, 4, 2
WRITABLE = (CHANNEL_OUT, STDERR)  # the only descriptors that stage 2 lets a worker write to


def number(name: str, arch: str = "x86_64") -> int | None:
    """Return the number of a call, None where the architecture lacks it."""
    return NUMBERS[name][0 if arch == "x86_64" else 1]
