"""Invented passages of 80 to 200 words to be summarized, each of another field; names and figures are made up."""

PASSAGES = (
    """The ferry between Harrow Point and the island of Selm has run twice a day since 1931, but the harbour office
    says that it may not survive another winter. The present ship, the Annike, is forty-four years old and needs a
    new engine that would cost more than the vessel itself is worth. The island's three hundred residents depend
    on it for food, mail and visits to the hospital. Two plans are on the table. The first would replace the ferry
    with a smaller electric boat that carries passengers only, with a freight barge once a week. The second would
    build a bridge over the narrowest part of the sound, paid for by the region over thirty years. Islanders are
    divided: shopkeepers favour the bridge, while many older residents fear that it would turn Selm into a suburb.
    A vote is expected in March.""",
    """Honey bees find their way home by combining several sources of information. On clear days they read the
    position of the sun and correct it for the time of day. When clouds hide the sun, they rely on the pattern of
    polarised light in whatever patch of sky is visible. Close to the hive, landmarks such as hedges and roof
    edges take over. In a recent field study, researchers caught foraging bees and released them in an unfamiliar
    meadow nine kilometres away. Nearly two thirds returned within a day, though they took long, looping routes at
    first. Bees that had been exposed to low doses of a common pesticide returned only half as often, and those
    that did took three times as long. The authors conclude that the chemical does not kill the insects directly
    but disturbs the memory that ties landmarks together.""",
    """When the bakery on Mill Street announced that it would stop slicing bread, customers laughed. The owner,
    Teresa Valdo, explained that the slicing machine broke down every month and that the spare parts came from a
    company that no longer existed. She offered to teach anyone how to cut a loaf properly and put a wooden board
    and a good knife next to the till. Six months later, sales of whole loaves have risen by a fifth. Regulars
    stand at the board and talk while they slice, and a retired carpenter has begun to sharpen the knife each
    Friday in exchange for rye bread. Valdo says that she saved the price of a new machine and gained a meeting
    place. Two other bakeries in the district are now planning to do the same, although a third reports that its
    customers simply went to the supermarket.""",
    """The patient, a 58-year-old gardener, came to the clinic with tiredness that had lasted three months and a mild
    pain in both knees. Blood tests showed a low level of iron and a slightly raised marker of inflammation; liver
    and kidney values were normal. An examination of the stomach found a small ulcer, which explained the loss of
    iron. The patient had taken a painkiller almost daily for his knees without telling his doctor, because he had
    bought it without a prescription. He was advised to stop the tablets, was given a medicine that reduces
    stomach acid, and took iron for eight weeks. At the next visit the ulcer had healed and the iron level was
    back to normal. The knee pain, treated with exercises and a cooling gel, had improved but not disappeared. A
    further check is planned in half a year.""",
    """Quarterly report, northern division. Revenue rose to 48.2 million, seven percent above the same quarter last
    year, mostly because of strong demand for heat pumps in newly built homes. Sales of gas boilers fell by
    eighteen percent and now make up less than a third of the business. The factory in Orlund ran at 91 percent of
    its capacity; two weeks of production were lost in May when a supplier of compressors delivered faulty parts.
    Costs for steel and copper were stable, while wages grew by four percent after the agreement with the union.
    Operating profit came to 5.1 million, against 5.6 million a year ago, since the division spent 1.3 million on
    training installers. Management expects the training to pay off from autumn, when subsidies for old houses
    begin, and leaves its forecast for the whole year unchanged.""",
    """For most of its history the town of Brack had two clocks. The one on the church showed the time of the
    bishop's seat, the one on the town hall the time of the merchants' guild, and they differed by eleven minutes.
    Market stalls opened by the first and closed by the second, so that traders always had eleven minutes more
    than the law allowed. When the railway arrived in 1868, the company demanded a single time for its timetable.
    The council debated for four years. Finally a watchmaker, tired of being blamed by both sides, stopped both
    clocks one night and left them at noon. The town lived without public time for a summer, until travellers
    complained so loudly that the council adopted railway time. The stopped hands of the old guild clock can still
    be seen in the local museum.""",
    """Concrete owes its strength to a slow reaction between cement and water, and it goes on hardening for years.
    The trouble is the cement: making one tonne of it releases roughly six hundred kilograms of carbon dioxide,
    partly from fuel and partly from the limestone itself. A group of engineers has tested a mixture in which
    forty percent of the cement is replaced by burnt clay and finely ground waste glass. After seven days the new
    concrete was weaker than the ordinary kind, but after ninety days it was slightly stronger, and it let less
    salt water through. That makes it attractive for harbour walls, where there is time to wait. The engineers
    warn that the supply of suitable clay differs from region to region, and that building codes, which test
    strength after twenty-eight days, would reject the mixture as they stand.""",
    """Dear tenants, the renovation of the stairwells will begin on Monday the 4th and take about five weeks. Work is
    done on weekdays between eight and four. In the first week the old paint is removed, which will be noisy and
    dusty, so please keep your doors closed and take mats and shoe racks inside. In the second and third weeks the
    electric lines are replaced; the light in the stairwell will then be provided by battery lamps. The lift stays
    in service except on the 12th and 13th. Painting follows in the last two weeks, with a water-based paint that
    hardly smells. Bicycles left on the landings after the 3rd will be brought to the cellar. If you need help
    with carrying things on the two days without a lift, call the caretaker by the evening before. The rent will
    not rise because of this work.""",
    """The cup final between Norvale and the Eastbrook Rovers was decided in the last minute of extra time. Norvale
    had led since the twelfth minute, when their captain Ilse Brandt headed in a corner, and for an hour their
    defence hardly allowed a shot. Eastbrook changed its formation after the break and sent on the
    nineteen-year-old Amara Diallo, who had recovered from a knee injury only two weeks before. Her cross led to
    an own goal in the eighty-first minute. In extra time both sides seemed to wait for penalties, until Diallo
    won the ball near the halfway line, ran past two players and shot from twenty metres. The goalkeeper touched
    the ball but could not hold it. It was the first title for the Rovers in twenty-six years. Norvale's coach
    praised the winners and confirmed that she will leave in the summer.""",
    """Soil is often described as if it were a container for plants, but much of it is made by the plants themselves.
    Roots leak sugars that feed bacteria and fungi, and these in turn release minerals and glue small particles
    together into crumbs. Between the crumbs lie pores that hold water and air. Heavy machines press the pores
    shut, and once that has happened below the depth of the plough the damage may last for decades. Farmers in one
    river valley have begun to drive on fixed tracks, so that nine tenths of a field is never touched by a wheel.
    After six years the untouched strips took up rain four times as fast as before, and yields in dry summers were
    a tenth higher. The method needs machines of the same width, which small farms can rarely afford unless they
    buy them together.""",
    """The museum of everyday things does not own a single famous object. Its collection of nine thousand items began
    with a box of can openers that the founder, a retired teacher, had inherited from an aunt. Visitors are
    invited to open drawers and take things into their hands. A guide explains how a potato peeler changed with
    the price of steel, or why door handles became lower after lifts were introduced. The museum receives no
    public money; it lives on entrance fees and on a repair workshop in the basement, where volunteers mend
    toasters on Saturdays. Last year it had to turn down four hundred donations for lack of space. The city has
    now offered an empty tram depot at the edge of town, but the founder hesitates, since most visitors today are
    people who come by chance while shopping nearby.""",
    """Astronomers have found a planet that circles its star in only nineteen hours. It is about one and a half times
    as wide as the Earth but four times as heavy, which suggests a large core of iron. The side that faces the
    star is probably molten, with a temperature above two thousand degrees, while the other side lies in permanent
    night. The planet was noticed because the light of the star dips by a tiny amount each time it passes in
    front. What puzzles the team is a second dip that appears some minutes later and changes in depth from orbit
    to orbit. They suspect a tail of dust, made of rock that boils off and freezes again. If they are right, the
    composition of the dust could reveal what the inside of a rocky planet is made of. Observations with a larger
    telescope are planned for next spring.""",
    """Minutes of the parents' meeting. The chair welcomed twenty-three parents and two teachers. The summer trip was
    discussed first: the hostel by the lake has raised its price by thirty a child, and the association will cover
    half of the increase from the proceeds of the flea market. Families who cannot pay the rest may speak to the
    class teacher in confidence. Second, the school kitchen will offer a meal without meat every day instead of
    twice a week; a survey had shown that two out of three pupils wanted this. Third, several parents complained
    about cars that stop on the pedestrian crossing in the morning. The head teacher will ask the town for
    bollards, and until then parents will take turns at the crossing. A list for volunteers was passed round and
    has eleven names. The next meeting is on the 9th of November.""",
    """Sourdough is a mixture of flour and water in which wild yeasts and bacteria live together. The yeasts make the
    gas that lifts the dough, and the bacteria make acids that give it taste and keep mould away. Bakers often
    claim that the air of their own town gives their bread its character. To test this, a laboratory asked
    eighteen bakers from different countries to prepare a starter from the same flour by the same recipe. The
    starters turned out to be quite different, but the differences had little to do with the air. They matched the
    microbes on the bakers' hands. In turn, the hands of the bakers carried far more sour bacteria than those of
    other people. After a year of daily feeding the starters had become more alike, apparently because the flour,
    which was the same for all, brings in new microbes at each feeding.""",
    """The regional court has ruled that a homeowner must remove the wind chimes from his balcony. The neighbour, who
    works at night and sleeps during the day, had complained for two years and kept a diary of the noise. The
    owner argued that the chimes were quieter than the street and that nobody else had objected. An expert
    measured the sound and found that it stayed below the legal limit. The judges nevertheless sided with the
    neighbour. A limit on loudness, they wrote, was made for steady noise; a tone that comes and goes without a
    pattern disturbs sleep even when it is faint. The owner may hang the chimes inside his flat. Each side pays
    its own lawyer. The ruling is not final, since the court allowed an appeal because the question of irregular
    sounds has not been settled by a higher court.""",
    """In the 1950s the valley of Tarn was emptied to make room for a reservoir. Forty-one farms, a school and a
    chapel disappeared under the water, and their owners were paid according to the size of their fields. Those
    who had rented, about half of the families, received nothing but the cost of moving. A historian has now
    traced where they went. Most stayed within thirty kilometres; many took work on the dam itself, and later in
    the power station. She found that the families met each summer on the shore until the 1980s, and that they
    used the names of the sunken farms as surnames for one another. During the drought of last year the walls of
    the school emerged from the mud. Some two thousand people came to look, and three women in their eighties
    showed visitors where their desks had stood.""",
    """Electric buses have a simple problem in winter: heating the cabin can use as much energy as driving. The
    transport company of Lindau tried three answers on its line 7. One bus was fitted with a heat pump, the second
    with heated seats and thicker windows, and the third with a small stove that burns plant oil. Over a winter of
    normal cold, the heat pump reduced the energy used for heating by a half, but hardly helped on the coldest
    days. The heated seats saved a third, and passengers liked them so much that other drivers reported
    complaints. The stove kept the full range of the bus but needed fuel and a yearly inspection. The company has
    decided to combine seats and heat pump in the forty buses that it will order next year, and to keep the stove
    as a reserve in six of them.""",
    """The reading app had been praised by teachers for its colourful stories, but nobody had measured whether
    children read better because of it. A group of psychologists followed 612 pupils in their second year of
    school. Half of the classes used the app for fifteen minutes a day, the others read printed books for the same
    time. After five months both groups had improved, and there was no difference in how fast they read. Children
    with the app knew slightly more new words; children with books remembered more of what had happened in the
    stories. The weakest readers gained most when an adult sat beside them, whatever they read from. The makers of
    the app welcomed the study and announced a mode for two readers. The authors note that fifteen minutes a day
    was less than either group had been asked for.""",
    """Rust never sleeps, say the painters of the Hollin bridge, who need seven years to work from one end to the
    other and then begin again. Last autumn a small robot joined them. It crawls along the girders on magnetic
    wheels, takes a photograph of every hand's breadth of steel and compares it with the picture from the previous
    visit. In its first three months it found 214 places where the paint had lifted, among them nine that the
    inspectors had overlooked because they could only be seen from below. It also reported some six hundred bird
    droppings as damage. The painters were sceptical at first, but now they start the week with the robot's list.
    The bridge authority expects that paint will last two years longer where small spots are repaired at once, and
    has asked for a second robot.""",
    """The choir had sung in the same cold church for sixty years when the heating failed for good. Rather than stop
    for the winter, its conductor asked a swimming pool, a fire station and a furniture shop whether they would
    have the singers for a rehearsal. All three said yes. In the pool every phrase echoed for six seconds, so they
    sang very slow music from the sixteenth century. In the fire station they stood between the engines and had to
    leave one rehearsal unfinished. In the furniture shop customers sat down on the sofas to listen, and four of
    them joined the choir. The heating has since been repaired with donations, but the choir has decided to spend
    one month of every year on the road. Requests have come from a brewery, a bus garage and a school for the
    deaf, which wants to feel the basses through the floor.""",
    """Changes in version 4.2. The import of large files has been rewritten: a file is now read in pieces, so that
    memory use no longer depends on its size, and an import that was interrupted continues where it stopped.
    Search results appear while the search is still running. The old settings dialog has been replaced by a page
    with a search field; settings that differ from the default are marked. We removed the export to the 2009
    format, which fewer than one user in a thousand had used in the past year; version 4.1 remains available for
    those who need it. Two errors were corrected that could lead to wrong totals: one when a column contained both
    dates and text, and one when the clock changed to summer time during a calculation. Users who made reports on
    the last Sunday of March should make them again.""",
    """Salt was once so valuable in the uplands that it was carried on foot over a pass of 2,300 metres. The porters,
    many of them women, walked at night in summer because the sun softened the snow. A load weighed thirty
    kilograms, and the journey took four days in each direction. Each village on the way had a right to a handful
    of salt from every load, in return for which it kept the path clear and lit a lamp in bad weather. When a road
    was opened in the next valley in 1842, the trade ended within two years. The path fell into ruin, but the
    lamps were kept burning in three villages until the First World War. Today a hiking club has restored the
    route. Walkers who carry a symbolic bag of salt are given soup in the villages, and last summer about nine
    hundred of them did.""",
    """The experiment began with a mistake. A student had left two trays of seedlings on a window sill over the
    holidays, one beside a radiator that clicked as it warmed and cooled, the other beside a silent one. On her
    return the first tray had noticeably thicker stems. Temperature and light had been almost the same, so she
    wondered whether the vibration mattered. In a controlled trial with 480 plants she shook the pots for ten
    minutes a day with a small motor. The shaken plants grew eleven percent shorter but could bear a third more
    weight before they bent. Wind is known to have the same effect, but so far it had been attributed to drying.
    The student, now in her third year, is testing which frequencies work best. A greenhouse company hopes to
    replace a chemical that keeps tomato plants short.""",
    """A loan for a used car looks simple, but the monthly rate hides several costs. First there is interest, which
    dealers often state for the first year only. Then there may be a fee for arranging the loan, usually two or
    three percent, which is added to the debt and so bears interest itself. Many contracts include an insurance
    that pays if the borrower loses his job; it is rarely needed by those who have savings, and excludes the first
    ninety days. Finally, some loans end with a large last payment, and whoever cannot pay it has to borrow again
    on worse terms. The consumer office advises people to compare the total of all payments instead of the rate,
    to ask for an offer without insurance, and to find out what it costs to repay early. Of 120 contracts
    examined, only 31 stated all of this clearly.""",
    """The lighthouse keeper's daughter, Maren, was nine when she first kept the lamp alone. Her father had rowed to
    the mainland for oil and was held back by fog. She had watched him often enough to know that the wick must be
    trimmed every four hours and that the glass must never be touched with wet hands. At two in the morning the
    mechanism that turned the lens jammed. She could not lift the weight that drove it, so she pushed the lens by
    hand, counting aloud to keep the rhythm by which ships would know the light. At dawn she heard a horn, and
    then another, closer. Her father came back at noon and found her asleep on the stairs. The logbook of that
    night has a line in a child's hand: lamp lit, fog, turned it myself, nothing to report.""",
    """Desalination turns sea water into drinking water, but it leaves behind a brine twice as salty as the sea. Most
    plants pump it back, where it sinks to the bottom and harms whatever lives there. A pilot plant on a dry coast
    has tried to use the brine instead. In a first basin, small shrimps feed on algae and are sold to fish farms.
    The water, saltier by then, flows to a second basin where plants that tolerate salt are grown as fodder for
    goats. What remains dries in the sun and yields table salt and a little magnesium. The plant makes only four
    percent of its income from these products, yet it saves the cost of a two-kilometre pipe. Biologists who
    examined the shore found no change after three years. The greatest obstacle is space: the basins cover eleven
    times the area of the plant.""",
    """The folding umbrella stand of the Orsk tram was meant to last a single season. It consisted of twenty slots
    beside each door, where passengers could leave a wet umbrella and take a dry one from the opposite row.
    Critics predicted that every umbrella would be stolen within a week. In fact the number grew: people brought
    old ones from home, and after a year the company had to remove some four hundred broken ones. A student of
    economics counted for three months and found that on rainy mornings umbrellas travelled from the suburbs to
    the centre, and in the evening back again, so that the stands balanced themselves. Only on days when the
    weather changed at noon did they run empty at one end of the line. The company now moves sixty umbrellas at
    lunchtime on such days, and has asked the weather service for an earlier forecast.""",
    """The committee has read 64 applications for the small grants of this year and recommends eleven for funding.
    The largest sum, 18,000, goes to a group of fishers and biologists who will test nets with lights that warn
    turtles away. A school receives 4,500 to measure the air along its bus route with instruments that the pupils
    build themselves. Three projects concern old crafts: dry stone walls, boat caulking and the dyeing of wool
    with lichens. The committee was impressed by a plan for a mobile library but asks the applicants to find a
    second driver before any money is paid. It regrets that no application came from the two southern districts,
    and suggests that next year's call be announced on the local radio as well. All groups have to report in
    writing by the end of June, and to show their results at an open day in September.""",
    """Glaciers keep a diary in layers. Each year's snow is pressed into ice together with the dust, pollen and
    bubbles of air of that year. A team drilled 152 metres into a glacier near the equator that is expected to
    vanish within twenty years and brought the core to a cold store on another continent. The upper third shows
    the soot of a century of engines. Below it lies a grey band from a volcanic eruption that had been known only
    from a local legend; it can now be dated to about 1470. The lowest layers are some 1,700 years old. The most
    surprising find was a gap: around the year 1100 about sixty years are missing, which means that the glacier
    melted from above even then, though it recovered. The researchers stress that the present loss is faster, and
    reaches all the neighbouring glaciers at once.""",
    """The call centre used to measure its staff by how short their calls were. The average was four minutes and ten
    seconds, and those who stayed below it received a bonus. A new manager noticed that a third of all callers
    rang again within a week, usually because their problem had not been solved. She dropped the bonus and counted
    the second calls instead. In the first month the average call took six minutes, the queue grew, and two
    supervisors asked for the old rule. In the third month the number of calls had fallen by a quarter, so that
    the queue was shorter than ever. Sick leave fell too. Not everything improved: a handful of people took very
    long over simple questions, and the centre now looks at both figures, though it pays for neither.""",
    """Whales fall silent when ships come near, but until lately nobody knew how long the silence lasts. In a bay
    with a single busy ferry, biologists laid nine microphones on the sea floor and recorded for two summers.
    Humpbacks stopped singing when the ferry was about eight kilometres away, long before a human diver could have
    heard it, and began again some forty minutes after it had passed. With six crossings a day they were silent
    for a third of all daylight hours. In the second summer the ferry went more slowly, which added nine minutes
    to the trip and halved the noise. The whales then stopped only when it was within three kilometres. The ferry
    company saved a tenth of its fuel and has kept the lower speed, although commuters have asked for one fast
    crossing in the morning.""",
    """A password that is easy to remember is often easy to guess, and one that is hard to guess ends up on a note
    under the keyboard. A firm of 900 employees compared three rules over a year. One group had to change its
    passwords every sixty days, a second could keep them but had to use at least sixteen characters, and a third
    was given a program that makes and stores them. In a test attack the first group fared worst: four passwords
    in ten were guessed, most of them an old one with a number added. In the second group it was one in ten, and
    in the third none. The help desk, however, was called most often by the third group, chiefly in the first two
    weeks. The firm has chosen the program for all, with a training of one hour, and no longer asks anybody to
    change a password without a reason.""",
)
