BEGIN TRANSACTION;
CREATE TABLE facts (
	job_id VARCHAR(32) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	number INTEGER NOT NULL, 
	body TEXT NOT NULL, 
	recorded_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, kind, number), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "facts" VALUES('4813cdbb67c4','merge',0,'{"files":{"model.safetensors":{"bytes":10,"sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}},"manifest":"mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm","bytes":10,"seconds":1.5,"parameters":7,"notices":[{"code":"NOTE","sentence":"s.","next_step":"n."}]}',1767323047.0);
INSERT INTO "facts" VALUES('4813cdbb67c4','evaluation',0,'{"manifest":"mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm","merged":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","scores":[{"task":"arc_easy","metric":"acc","value":0.75,"stderr":0.2,"samples":4,"few_shot":0,"higher_is_better":true,"task_version":"1.0","filter":"none","data":{"repo":"org/arc","config":null,"split":"test","revision":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"},"chance":0.25}],"environment":{"device":"cpu","dtype":"float32","batch_size":"auto","chat_template":false,"seed":0,"lm_eval":"0.4.13","transformers":"4.57","torch":"2.9","limit":4,"backend":"hf"},"seconds":2.0,"others":[],"key":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","smallest_batch":1,"task_seconds":[2.0]},"sources":{"org/a@aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","scores":[{"task":"arc_easy","metric":"acc","value":0.5,"stderr":0.2,"samples":4,"few_shot":0,"higher_is_better":true,"task_version":"1.0","filter":"none","data":{"repo":"org/arc","config":null,"split":"test","revision":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"},"chance":0.25}],"environment":{"device":"cpu","dtype":"float32","batch_size":"auto","chat_template":false,"seed":0,"lm_eval":"0.4.13","transformers":"4.57","torch":"2.9","limit":4,"backend":"hf"},"seconds":2.0,"others":[],"key":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","smallest_batch":1,"task_seconds":[2.0]}},"decode_speed":{"speedup":1.5},"seconds":3.0,"heads":{"medusa/heads.safetensors":{"bytes":5,"sha256":"9999999999999999999999999999999999999999999999999999999999999999"}},"comparison":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","keys":{"":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","org/a":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"},"tasks":[{"task":"arc_easy","metric":"acc","samples":4,"chance":0.25,"merge":{"model":"","value":0.75,"interval":[0.3,0.95]},"parents":[{"model":"org/a","value":0.5,"interval":[0.15,0.85]}],"differences":[{"parent":"org/a","value":0.25,"interval":[-0.1,0.6],"p":0.3,"adjusted_p":0.3,"detectable":0.4,"test":"McNemar","won":1,"lost":0}],"patterns":[{"right":["org/a"],"questions":2,"kept":2}],"same_choice":{"org/a":3}}],"overall":{"tasks":["arc_easy"],"merge":{"model":"","value":0.75,"interval":[0.3,0.95]},"parents":[{"model":"org/a","value":0.5,"interval":[0.15,0.85]}],"differences":[{"parent":"org/a","value":0.25,"interval":[-0.1,0.6],"p":0.3,"adjusted_p":0.3,"detectable":0.4,"test":"McNemar","won":1,"lost":0}]},"left_out":[{"task":"x","because":"it has one question"}]},"not_compared":"","vitals":{"":{"finite":true,"bits_per_byte":1.2,"perplexity":9.0,"vocabulary":64,"missing_rows":0,"continuations":4,"distinct":0.9,"broken":0,"texts":6,"survived":6,"tokens_per_s":100.0,"device":"cpu","dtype":"float32","looping":0}}}',1767323047.0);
INSERT INTO "facts" VALUES('4813cdbb67c4','publication',0,'{"repo":"bot/published","commit":"1111111111111111111111111111111111111111","seconds":1.0}',1767323048.0);
INSERT INTO "facts" VALUES('d9a828f22d0e','failure',0,'{"stage":"merging","code":"DISK_FULL","sentence":"The disk is full.","next_step":"Wait.","retry_at":null}',1767323057.0);
INSERT INTO "facts" VALUES('5d60d3cf2a9c','merge',0,'{"files":{"model.safetensors":{"bytes":10,"sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}},"manifest":"mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm","bytes":10,"seconds":1.5,"parameters":7,"notices":[{"code":"NOTE","sentence":"s.","next_step":"n."}]}',1767323077.0);
INSERT INTO "facts" VALUES('5d60d3cf2a9c','evaluation',0,'{"manifest":"mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm","merged":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","scores":[{"task":"arc_easy","metric":"acc","value":0.75,"stderr":0.2,"samples":4,"few_shot":0,"higher_is_better":true,"task_version":"1.0","filter":"none","data":{"repo":"org/arc","config":null,"split":"test","revision":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"},"chance":0.25}],"environment":{"device":"cpu","dtype":"float32","batch_size":"auto","chat_template":false,"seed":0,"lm_eval":"0.4.13","transformers":"4.57","torch":"2.9","limit":4,"backend":"hf"},"seconds":2.0,"others":[],"key":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","smallest_batch":1,"task_seconds":[2.0]},"sources":{"org/a@aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","scores":[{"task":"arc_easy","metric":"acc","value":0.5,"stderr":0.2,"samples":4,"few_shot":0,"higher_is_better":true,"task_version":"1.0","filter":"none","data":{"repo":"org/arc","config":null,"split":"test","revision":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"},"chance":0.25}],"environment":{"device":"cpu","dtype":"float32","batch_size":"auto","chat_template":false,"seed":0,"lm_eval":"0.4.13","transformers":"4.57","torch":"2.9","limit":4,"backend":"hf"},"seconds":2.0,"others":[],"key":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","smallest_batch":1,"task_seconds":[2.0]}},"decode_speed":{"speedup":1.5},"seconds":3.0,"heads":{"medusa/heads.safetensors":{"bytes":5,"sha256":"9999999999999999999999999999999999999999999999999999999999999999"}},"comparison":{"suite":"quick","suite_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","keys":{"":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","org/a":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"},"tasks":[{"task":"arc_easy","metric":"acc","samples":4,"chance":0.25,"merge":{"model":"","value":0.75,"interval":[0.3,0.95]},"parents":[{"model":"org/a","value":0.5,"interval":[0.15,0.85]}],"differences":[{"parent":"org/a","value":0.25,"interval":[-0.1,0.6],"p":0.3,"adjusted_p":0.3,"detectable":0.4,"test":"McNemar","won":1,"lost":0}],"patterns":[{"right":["org/a"],"questions":2,"kept":2}],"same_choice":{"org/a":3}}],"overall":{"tasks":["arc_easy"],"merge":{"model":"","value":0.75,"interval":[0.3,0.95]},"parents":[{"model":"org/a","value":0.5,"interval":[0.15,0.85]}],"differences":[{"parent":"org/a","value":0.25,"interval":[-0.1,0.6],"p":0.3,"adjusted_p":0.3,"detectable":0.4,"test":"McNemar","won":1,"lost":0}]},"left_out":[{"task":"x","because":"it has one question"}]},"not_compared":"","vitals":{"":{"finite":true,"bits_per_byte":1.2,"perplexity":9.0,"vocabulary":64,"missing_rows":0,"continuations":4,"distinct":0.9,"broken":0,"texts":6,"survived":6,"tokens_per_s":100.0,"device":"cpu","dtype":"float32","looping":0}}}',1767323078.0);
INSERT INTO "facts" VALUES('5d60d3cf2a9c','failure',0,'{"stage":"publishing","code":"HUB_UNREACHABLE","sentence":"The Hub does not answer.","next_step":"Wait.","retry_at":"2026-01-02T03:05:35Z"}',1767323079.0);
CREATE TABLE jobs (
	id VARCHAR(32) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	requester VARCHAR(96) NOT NULL, 
	request_key VARCHAR(64) NOT NULL, 
	recipe TEXT NOT NULL, 
	sources TEXT NOT NULL, 
	"plan" TEXT NOT NULL, 
	submitted_at FLOAT NOT NULL, 
	attempts INTEGER NOT NULL, 
	claimed_at FLOAT, 
	not_before FLOAT, 
	lease_owner VARCHAR(128), 
	lease_token VARCHAR(32), 
	lease_expires_at FLOAT, 
	cancelled_at FLOAT, 
	committing BOOLEAN NOT NULL, 
	progress TEXT, 
	ended_at FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('4813cdbb67c4','pppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppp','alice','461c4147e956031a990a0b6304ec15b273856e1bebe308633febc033455409c8','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323045.0,1,1767323046.0,NULL,NULL,NULL,NULL,NULL,1,NULL,1767323048.0);
INSERT INTO "jobs" VALUES('d9a828f22d0e','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','alice','cc41761d681ab501c96cfd4f706c444952b92ed045cfa8c64291b3744dc6befc','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323055.0,1,1767323056.0,NULL,NULL,NULL,NULL,NULL,0,NULL,1767323057.0);
INSERT INTO "jobs" VALUES('45e88f479ae1','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','alice','86c371cd16307f38c8ab6fe2c9944b1cca520032296d663c2efe7f06be3fdbcf','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323065.0,0,NULL,NULL,NULL,NULL,NULL,1767323066.0,0,NULL,1767323066.0);
INSERT INTO "jobs" VALUES('5d60d3cf2a9c','eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee','bob','5d6bc1f728190439c07f0c5949c120ed3c0499d7e7d290545f27d3690e989901','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323075.0,1,1767323076.0,1767323135.0,NULL,NULL,NULL,NULL,0,NULL,NULL);
INSERT INTO "jobs" VALUES('36f27ea082a9','mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm','carol','225fc3ab1290538fc7e8c8335e2c639e56c3ce99e48d9d32f7309ec21d7c62ac','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323085.0,1,1767323086.0,NULL,'w','b343e6eae82d1896034c170a505af132',1767323187.0,NULL,0,'{"text": "Merging", "done": 3, "total": 10}',NULL);
INSERT INTO "jobs" VALUES('b0d4fa3217df','qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq','dave','f66a5da0973fad8695639afaa50f92cef25f98a9f6805afe514964119baae3d5','{"merge_method": "linear"}','[{"repo":"org/a","revision":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","licence":"mit","bytes":10,"adapter":false},{"repo":"org/b","revision":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","licence":"apache-2.0","bytes":10,"adapter":true}]','{"method": "linear"}',1767323095.0,0,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL);
CREATE TABLE leaders (
	name VARCHAR(32) NOT NULL, 
	owner VARCHAR(128) NOT NULL, 
	expires_at FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE requests (
	"key" VARCHAR(64) NOT NULL, 
	requester VARCHAR(96) NOT NULL, 
	received_at FLOAT NOT NULL, 
	request TEXT NOT NULL, 
	job_id VARCHAR(32), 
	refusal TEXT, 
	answered VARCHAR(32), 
	PRIMARY KEY ("key"), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "requests" VALUES('461c4147e956031a990a0b6304ec15b273856e1bebe308633febc033455409c8','alice',1767323045.0,'{"requester":"alice","origin":"form","text":"recipe of published","name":"published","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":null,"revision":null,"reply":"none","run":1}','4813cdbb67c4',NULL,'none');
INSERT INTO "requests" VALUES('cc41761d681ab501c96cfd4f706c444952b92ed045cfa8c64291b3744dc6befc','alice',1767323055.0,'{"requester":"alice","origin":"form","text":"recipe of failed","name":"failed","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":null,"revision":null,"reply":"none","run":1}','d9a828f22d0e',NULL,'none');
INSERT INTO "requests" VALUES('86c371cd16307f38c8ab6fe2c9944b1cca520032296d663c2efe7f06be3fdbcf','alice',1767323065.0,'{"requester":"alice","origin":"form","text":"recipe of cancelled","name":"cancelled","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":null,"revision":null,"reply":"none","run":1}','45e88f479ae1',NULL,'none');
INSERT INTO "requests" VALUES('5d6bc1f728190439c07f0c5949c120ed3c0499d7e7d290545f27d3690e989901','bob',1767323075.0,'{"requester":"bob","origin":"form","text":"recipe of evaluated","name":"evaluated","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":null,"revision":null,"reply":"none","run":1}','5d60d3cf2a9c',NULL,'none');
INSERT INTO "requests" VALUES('225fc3ab1290538fc7e8c8335e2c639e56c3ce99e48d9d32f7309ec21d7c62ac','carol',1767323085.0,'{"requester":"carol","origin":"form","text":"recipe of merging","name":"merging","evaluate":{"suite":"none","tasks":["arc_easy"],"limit":4,"chat_template":true,"speed":"medusa"},"repo":null,"revision":null,"reply":"none","run":1}','36f27ea082a9',NULL,'none');
INSERT INTO "requests" VALUES('f66a5da0973fad8695639afaa50f92cef25f98a9f6805afe514964119baae3d5','dave',1767323095.0,'{"requester":"dave","origin":"form","text":"recipe of queued","name":"queued","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":null,"revision":null,"reply":"none","run":1}','b0d4fa3217df',NULL,'none');
INSERT INTO "requests" VALUES('dbc7740719b9ddbbcd85b637fd284fa2975244db0272bdf7e0a7f44b98536c0c','org',1767323105.0,'{"requester":"org","origin":"card","text":"recipe: x","name":"card","evaluate":{"suite":"quick","tasks":[],"limit":null,"chat_template":false,"speed":"off"},"repo":"org/card","revision":"7777777777777777777777777777777777777777","reply":"discussion","run":1}',NULL,'{"code": "CARD_INVALID", "message": "The block is not of version 1.", "value": null, "where": null, "next": "Write `version: 1`."}',NULL);
CREATE INDEX ix_jobs_submitted_at ON jobs (submitted_at);
CREATE INDEX ix_jobs_digest ON jobs (digest);
CREATE INDEX ix_jobs_requester ON jobs (requester);
CREATE INDEX ix_jobs_ended_at ON jobs (ended_at);
CREATE INDEX ix_requests_received_at ON requests (received_at);
CREATE INDEX ix_requests_job_id ON requests (job_id);
CREATE INDEX ix_requests_requester ON requests (requester);
COMMIT;
