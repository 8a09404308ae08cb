"""Three consonants that mean something to many people, and so to a text encoder: no subject is named by them.

A vocabulary of byte pairs holds such a word because it was frequent: CLIP's has 734, most of them abbreviations. Here
are those among its rarest 340 that are widely known, and offensive ones of the rest. They were told apart by reading
the list, not by measuring what a model draws for them.
"""

WORDS = """
hmv fck dbz rps pbc tvc gsp rmb pkg pln ssh mgt nrg bpd mwf ccd rsc fbs scd dds sks szn mgs grl sqm bnp lpg bgc clg
pkk chk tls bln hsv dwp brt smg cbp mtr tbr kgs dts cfd cns tmw mlg hpv lbj khz tbd ntv dsp dmx rcb scp tsb qtr mnd
btn skc psv tms rdr cls pms sht pvp pff crt lsd wsl jfc tsk tsm nmd fpv ccp csk mmj srp tbl cmt nbl ftp pss dtm fdr
ppm svt jdm bsd trc srs bcc frc cng kph msn kkr knw cfp bgt pbb mvc lls rms hdd pdc bpm wdw sdk hpc wcs btr wtc lnp
drm dsm nhm nhq dns sbk ssn tcs ppv klm cgc mts tks mpc ncr kzn tnx vpn qbs sfx mms ccg lbc mlm ssb rbc mpg kjv tbs
gts ldr tmz pnc jnr dnr rrp jpg sst ssr kkk wtf fml kms std thc
"""
KNOWN = frozenset(WORDS.split())
